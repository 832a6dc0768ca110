"""Compensated removal: readers absorb what kept channels predict of removed ones."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_kfacprune.compaction import compact, compensate, parity_error
from tf_kfacprune.compaction.readers import (
    CHANNELS_FIRST,
    GROUPED,
    SHARED,
    TOO_LARGE,
    UNSUPPORTED,
)
from tf_kfacprune.errors import DataError, InvalidArgumentError, ParityError
from tf_kfacprune.gates import GatedDense, GatedNetwork, insert_gates


def dense_chain(use_bias=True):
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, activation="relu", name="first"),
            layers.Dense(4, use_bias=use_bias, name="second"),
        ]
    )


def conv_chain(padding="same", strides=1, use_bias=True):
    return keras.Sequential(
        [
            keras.Input((7, 7, 2)),
            layers.Conv2D(6, 3, activation="relu", name="first"),
            layers.Conv2D(3, 3, padding=padding, strides=strides, use_bias=use_bias, name="second"),
        ]
    )


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.path.endswith("bias"):
            weight.assign(rng.normal(size=weight.shape))
    return model


def inputs_of(model, n=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, *model.input_shape[1:])).astype("float32")


def closing(model, closed, value=1.0):
    """A gated copy of the first group with some gates closed and the others at a value."""
    net = insert_gates(model)
    (bank,) = GatedNetwork(net).sources
    values = np.full(bank.size, value)
    values[list(closed)] = 0
    bank.set_values(values)
    return net


def compensated(net, x):
    small = compact(net)
    return small, compensate(net, small, x)


def combine(model, target, sources, factors):
    """Makes one channel of the first layer a combination of others, before a linear activation."""
    first = model.get_layer("first")
    first.activation = keras.activations.linear
    kernel, bias = first.kernel.numpy(), first.bias.numpy()
    kernel[..., target] = kernel[..., sources] @ factors
    bias[target] = bias[sources] @ factors
    first.kernel.assign(kernel)
    first.bias.assign(bias)


@pytest.mark.parametrize(
    "build",
    [
        dense_chain,
        conv_chain,
        lambda: conv_chain("valid", 2),
        lambda: conv_chain(use_bias=False),
    ],
)
def test_channels_that_others_determine_are_removed_without_loss(build):
    model = randomize(build())
    combine(model, 2, [0, 4], np.array([0.7, -1.3], "float32"))
    net, x = closing(model, [2]), inputs_of(model)
    small, report = compensated(net, x)
    assert parity_error(model(x), compact(net)(x)) > 1e-2
    assert parity_error(model(x), small(x)) < 2e-3  # damping leaves something
    (layer,) = report.layers
    assert (layer.layer, layer.removed, layer.kept) == ("second", 1, 5)
    assert layer.after < 1e-5 < layer.before
    assert report.examples == 40


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_bias_absorbs_a_constant_channel(use_bias):
    model = randomize(dense_chain(use_bias))
    first = model.get_layer("first")
    kernel, bias = first.kernel.numpy(), first.bias.numpy()
    kernel[:, 3], bias[3] = 0, 2.0
    first.kernel.assign(kernel)
    first.bias.assign(bias)
    x = inputs_of(model)
    small, report = compensated(closing(model, [3]), x)
    error = parity_error(model(x), small(x))
    assert (error < 1e-3) == use_bias
    assert (report.layers[0].after < 1e-6) == use_bias


@pytest.mark.parametrize("gate", [1.0, 0.6])
@pytest.mark.parametrize("use_bias", [True, False])
def test_weights_equal_the_formula_in_float64(gate, use_bias):
    model = randomize(dense_chain(use_bias))
    x, closed = inputs_of(model), [1, 4]
    small, report = compensated(closing(model, closed, gate), x)
    kept = [0, 2, 3, 5]
    read = keras.ops.convert_to_numpy(model.get_layer("first")(x)).astype("float64")
    read[:, kept] *= gate
    kernel = model.get_layer("second").kernel.numpy().astype("float64")
    known = np.concatenate([read[:, kept], np.ones((len(x), 1))], 1) if use_bias else read[:, kept]
    a_kk = known.T @ known / len(x)
    eps = 1e-4 * np.trace(a_kk) / len(a_kk)
    b = np.linalg.solve(a_kk + eps * np.eye(len(a_kk)), known.T @ read[:, closed] / len(x))
    change = b @ kernel[closed]
    found = small.get_layer("second")
    np.testing.assert_allclose(
        found.kernel.numpy(), gate * (kernel[kept] + change[:4]), rtol=2e-4, atol=1e-5
    )
    missing = read[:, closed] @ kernel[closed]
    spread = np.sum(np.var(read @ kernel, axis=0))
    before = np.mean(np.sum(missing**2, axis=1)) / spread
    after = np.mean(np.sum((missing - known @ change) ** 2, axis=1)) / spread
    assert report.layers[0].before == pytest.approx(before, rel=1e-3)
    assert report.layers[0].after == pytest.approx(after, rel=1e-3)


def test_layers_that_lose_outputs_and_inputs_are_compensated():
    model = randomize(
        keras.Sequential(
            [
                keras.Input((7, 7, 2)),
                layers.Conv2D(8, 3, activation="relu", name="first"),
                layers.Conv2D(9, 3, padding="same", activation="relu", name="second"),
                layers.Flatten(),
                layers.Dense(5, name="third"),
            ]
        )
    )
    net = insert_gates(model)
    (bank,) = GatedNetwork(net).sources
    bank.set_values(np.random.default_rng(0).uniform(size=bank.size) < 0.5)
    x = inputs_of(model, 300)
    small, report = compensated(net, x[:250])
    assert [layer.layer for layer in report.layers] == ["second", "third"]
    assert all(layer.after < layer.before for layer in report.layers)
    fresh, plain = x[250:], compact(net)
    missing, left = (np.mean((model(fresh) - other(fresh)) ** 2) for other in (plain, small))
    assert left < missing
    assert "second" in str(report)
    assert small.count_params() == plain.count_params()


def test_one_call_compacts_compares_and_compensates():
    model = randomize(dense_chain())
    net, x = closing(model, [0, 1]), inputs_of(model)
    expected, _ = compensated(net, x)
    small = compact(net, compensate=True, data=x)
    assert parity_error(expected(x), small(x)) == 0
    with pytest.raises(ParityError):  # compared before compensation
        compact(net, compensate=True, data=x, tolerance=-1.0)


def test_data_sets_and_batches_of_any_size_give_the_same():
    model = randomize(dense_chain())
    net, x = closing(model, [0, 1]), inputs_of(model)
    expected = compact(net, compensate=True, data=x)
    pairs = tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x)))).batch(7)
    for data in (pairs, pairs.map(lambda a, b: a)):
        found = compact(net, compensate=True, data=data)
        assert parity_error(expected(x), found(x)) < 1e-5


def test_several_inputs_are_taken_by_name():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = layers.Concatenate()([layers.Dense(5)(a), layers.Dense(5)(b)])
    model = randomize(keras.Model({"a": a, "b": b}, layers.Dense(2, name="out")(x)))
    rng = np.random.default_rng(0)
    data = {"a": rng.normal(size=(30, 4)), "b": rng.normal(size=(30, 3))}
    net = closing(model, [0, 7])
    _, report = compensated(net, data)
    assert report.layers[0].after < report.layers[0].before
    with pytest.raises(DataError, match="equally many"):
        compact(net, compensate=True, data={"a": data["a"], "b": data["b"][:7]})


def unsupported():
    image = keras.Input((6, 6, 2))
    shared = layers.Conv2D(4, 1, name="shared")
    x = layers.Conv2D(4, 3, padding="same", name="first")(image)
    x = layers.ReLU()(shared(layers.ReLU()(shared(x))))
    x = layers.Conv2D(6, 1, groups=2, name="grouped")(x)
    x = layers.Conv2DTranspose(6, 3, name="transposed")(x)
    x = layers.Conv2D(6, 3, name="plain")(x)
    return keras.Model(image, layers.Dense(2, name="wide")(layers.Flatten()(x)))


def test_layers_that_cannot_be_compensated_are_named_with_the_reason(monkeypatch):
    monkeypatch.setattr("tf_kfacprune.compaction.readers._LARGEST_INPUT", 60)
    model = randomize(unsupported())
    network = GatedNetwork(net := insert_gates(model))
    values = np.ones(network.num_gates)
    values[[group.start for group in network.channels.groups]] = 0
    network.sources[0].set_values(values)
    with pytest.warns(UserWarning, match="without compensation.*shared"):
        compact(net, compensate=True, data=inputs_of(model, 8))
    report = compensate(net, compact(net), inputs_of(model, 8))
    assert report.skipped == {
        "shared": SHARED,
        "grouped": GROUPED,
        "transposed": f"{UNSUPPORTED} (Conv2DTranspose)",
        "wide": TOO_LARGE.format(limit=60),
    }
    assert [layer.layer for layer in report.layers] == ["plain"]


def test_channels_first_convolutions_are_named(monkeypatch):
    # They do not run on a CPU, so nothing is accumulated here.
    monkeypatch.setattr("tf_kfacprune.compaction.compensation._accumulate", lambda *_: 1)
    options = {"data_format": "channels_first"}
    model = keras.Sequential(
        [
            keras.Input((3, 6, 6)),
            layers.Conv2D(4, 3, name="first", **options),
            layers.Conv2D(5, 3, name="second", **options),
        ]
    )
    net = closing(model, [1])
    report = compensate(net, compact(net, verify=False), None)
    assert report.skipped == {"second": CHANNELS_FIRST}


def test_models_gated_by_hand_are_compensated():
    x = keras.Input((6,))
    hidden = layers.Dense(8, activation="relu", name="hidden")(x)
    net = randomize(keras.Model(x, GatedDense(3, name="out")(hidden)))
    data = inputs_of(net)
    dense = net(data)
    GatedNetwork(net).sources[0].set_values([0, 1, 1, 0, 1, 1, 1, 1])
    small, report = compensated(net, data)
    assert report.layers[0].removed == 2
    assert parity_error(dense, small(data)) < parity_error(dense, net(data))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"compensate": True}, InvalidArgumentError),
        ({"data": np.zeros((3, 5), "float32")}, InvalidArgumentError),
        ({"compensate": True, "data": np.zeros((0, 5), "float32")}, DataError),
    ],
)
def test_data_belong_to_compensation(options, error):
    with pytest.raises(error, match="data"):
        compact(closing(dense_chain(), [0]), **options)


def test_one_shot_pruning_of_a_trained_network_loses_less_when_compensated():
    from tf_kfacprune.data import load

    keras.utils.set_random_seed(0)
    data = load("digits")
    x, x_test = (part.reshape(len(part), -1) for part in (data.x_train, data.x_test))
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, activation="relu", name="first"),
            layers.Dense(48, activation="relu", name="second"),
            layers.Dense(10, name="head"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    model.fit(x, data.y_train, epochs=6, batch_size=64, verbose=0)
    net = insert_gates(model)
    network, values = GatedNetwork(net), []
    for group, reader in zip(network.channels.groups, ("second", "head"), strict=True):
        norm = np.linalg.norm(model.get_layer(reader).kernel.numpy(), axis=1)
        values.append(norm >= np.sort(norm)[-group.size // 3])
    network.sources[0].set_values(np.concatenate(values))

    def accuracy(small):
        return np.mean(np.argmax(small.predict(x_test, verbose=0), axis=1) == data.y_test)

    dense, plain = accuracy(model), accuracy(compact(net))
    assert dense - accuracy(compact(net, compensate=True, data=x)) < 0.5 * (dense - plain)
