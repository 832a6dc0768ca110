from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import ClassVar

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune.compaction import (
    compact,
    compaction_report,
    parity_error,
    random_inputs,
    verify_parity,
)
from tf_kfacprune.errors import InvalidArgumentError, ParityError, UnsupportedModelError
from tf_kfacprune.gates import (
    GatedConv2D,
    GatedDense,
    GatedNetwork,
    GatePhase,
    NeuronGate,
    insert_gates,
)
from tf_kfacprune.graph import (
    ChannelRule,
    CostModel,
    analyze,
    keep_opaque,
    register_channel_rule,
)


def conv_bn(x, filters, size=3, activation="relu", **kwargs):
    x = layers.Conv2D(filters, size, padding="same", **kwargs)(x)
    return layers.Activation(activation)(layers.BatchNormalization()(x))


def lenet300():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Flatten(),
            layers.Dense(12, activation="tanh"),
            layers.Dense(8, activation="sigmoid"),
            layers.Dense(4, activation="softmax"),
        ]
    )


def lenet5():
    return keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(6, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(10, 3, activation="softplus"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(14, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(4),
        ]
    )


def residual():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, 8)
    for filters, strides in ((8, 1), (12, 2)):
        shortcut = x
        if strides > 1:
            shortcut = layers.Conv2D(filters, 1, strides=strides)(x)
            shortcut = layers.BatchNormalization()(shortcut)
        y = conv_bn(x, filters, strides=strides, activation="sigmoid")
        y = layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(y))
        x = layers.ReLU()(layers.Add()([shortcut, y]))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def densenet():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same")(inputs)
    for _ in range(3):
        y = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.Concatenate()([x, layers.Conv2D(4, 3, padding="same")(y)])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def separable():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, 6)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.SeparableConv2D(7, 3, padding="same", depth_multiplier=3)(x)
    x = layers.LeakyReLU()(x)
    x = conv_bn(x, 5, 1)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling2D()(x)))


def squeeze_excite():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, 8, activation="silu")
    s = layers.GlobalAveragePooling2D()(x)
    s = layers.Reshape((1, 1, 8))(s)
    s = layers.Conv2D(3, 1, activation="relu")(s)
    s = layers.Conv2D(8, 1, activation="sigmoid")(s)
    x = layers.Multiply()([x, s])
    x = layers.ZeroPadding2D(1)(x)
    x = layers.Cropping2D(((1, 0), (0, 1)))(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(conv_bn(x, 5))))


def grouped():
    inputs = keras.Input((8, 8, 3))
    x = conv_bn(inputs, 24)
    x = conv_bn(x, 32, groups=4)
    x = conv_bn(x, 64, groups=32)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def nested_and_shared():
    leaf_in = keras.Input((6,))
    leaf = keras.Model(leaf_in, layers.BatchNormalization()(layers.Dense(6)(leaf_in)), name="leaf")
    inputs = keras.Input((6,))
    shared = layers.Dense(6, activation="relu", name="shared")
    x = leaf(shared(shared(layers.Dense(6)(inputs))))
    x = 2.0 * leaf(x) + x - 0.5
    return keras.Model(inputs, [layers.Dense(3)(x), layers.Dense(2)(shared(x))])


def same_names_in_nested_models():
    def branch(name):
        return keras.Sequential(
            [keras.Input((5,)), layers.Dense(6, activation="relu", name="hidden")], name=name
        )

    inputs = keras.Input((5,))
    x = layers.Add()([branch("left")(inputs), branch("right")(inputs)])
    return keras.Model(inputs, layers.Dense(2)(x))


def moved_axes():
    inputs = keras.Input((6, 4))
    x = layers.Conv1D(24, 3, padding="same", activation="relu")(inputs)
    x = layers.Reshape((6, 8, 3))(x)  # channels become 8 heads x 3
    x = layers.Permute((2, 1, 3))(x)
    x = layers.Reshape((8, 18))(x)
    x = layers.Dense(5)(x)
    x = keras.ops.transpose(x, (0, 2, 1))
    x = layers.Dense(7, activation="relu")(x)  # contracts the heads
    x = keras.ops.transpose(x, (0, 2, 1))
    x = layers.Dense(2)(x)
    return keras.Model(inputs, layers.Dense(2)(keras.ops.reshape(x, (-1, 14))))


def upside_down():
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2DTranspose(6, 3, strides=2, padding="same")(inputs)
    x = layers.PReLU(shared_axes=[1, 2])(layers.BatchNormalization()(x))
    x = layers.UpSampling2D()(x)
    x = layers.Conv2DTranspose(5, 3, padding="same", activation="elu")(x)
    return keras.Model(inputs, layers.Conv2D(2, 3)(x))


def volumes():
    inputs = keras.Input((4, 4, 4, 2))
    x = layers.Conv3D(5, 3, padding="same", activation="relu")(inputs)
    x = layers.AveragePooling3D(2)(x)
    x = layers.Conv3D(4, 2, activation="gelu")(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))


def several_inputs():
    a, b = keras.Input((5,), name="a"), keras.Input((4, 4, 1), name="b")
    x = layers.Dense(6, activation="relu", name="left")(layers.Rescaling(0.5)(a))
    y = layers.Dense(6, activation="relu", name="right")(layers.Flatten()(b))
    z = layers.Maximum()([x, y])
    return keras.Model(
        {"a": a, "b": b},
        {"sum": layers.Dense(2)(z), "cat": layers.Dense(3)(layers.Concatenate()([x, a, y]))},
    )


def cut_up():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(12, 3, activation="tanh")(inputs)
    a, b = keras.ops.split(x, [4], axis=-1)
    y = layers.Conv2D(5, 1)(a)
    gate, content = keras.ops.split(layers.Conv2D(10, 1)(b), 2, axis=-1)
    x = layers.Concatenate()([y, keras.ops.sigmoid(gate) * content, x[..., 2:9]])
    x = layers.Dense(6, activation="relu")(x[:, 1:, :3])
    return keras.Model(inputs, layers.Dense(2)(keras.ops.mean(x, axis=(1, 2))))


MODELS = [
    cut_up,
    lenet300,
    lenet5,
    residual,
    densenet,
    separable,
    squeeze_excite,
    grouped,
    nested_and_shared,
    moved_axes,
    upside_down,
    volumes,
    several_inputs,
]


def randomize(model, seed=0):
    """Random statistics, scales, shifts and biases: closed channels must not hide behind zeros."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in ("beta", "moving_mean", "bias"):
            weight.assign(rng.normal(size=weight.shape))
        if kind in ("gamma", "moving_variance", "alpha"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def set_gates(net, hard, seed=0):
    rng = np.random.default_rng(seed)
    for source in GatedNetwork(net).sources:
        values = rng.uniform(0.2, 1.0, source.size) * (rng.uniform(size=source.size) < 0.6)
        source.set_values((values > 0).astype("float32") if hard else values)
    return net


def package_classes(model):
    return [x for x in model._flatten_layers() if type(x).__module__.startswith("tf_kfacprune")]


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("prune_inputs", [False, True], ids=["", "inputs"])
@pytest.mark.parametrize("build", MODELS)
def test_compact_equals_gated(build, prune_inputs, hard):
    keras.utils.set_random_seed(3)
    model = randomize(build())
    gated = insert_gates(model, prune_inputs=prune_inputs)
    x = random_inputs(model)
    assert parity_error(model(x), gated(x)) == 0
    set_gates(gated, hard)
    small = compact(gated, verify=False)
    effect = parity_error(model(x), gated(x))
    assert effect > 1e-2
    assert parity_error(gated(x), small(x)) <= 2e-6
    assert not package_classes(small)
    network = GatedNetwork(gated)
    kept = network.kept_neurons()
    assert small.count_params() == network.cost.count("params", kept) < model.count_params()
    assert CostModel(analyze(small)).macs_dense == network.cost.count("macs", kept)


@pytest.mark.parametrize("build", MODELS)
def test_open_gates_change_nothing(build):
    model = randomize(build())
    gated, x = insert_gates(model, prune_inputs=True), random_inputs(model)
    for a, b in zip(
        keras.tree.flatten(model(x, training=False)),
        keras.tree.flatten(gated(x, training=False)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    small = compact(gated, tolerance=0.0)
    assert small.count_params() == model.count_params()


def test_compact_model_loads_and_agrees_where_this_package_was_never_imported(tmp_path):
    gated = set_gates(insert_gates(randomize(residual()), prune_inputs=True), hard=False)
    flat = set_gates(insert_gates(randomize(several_inputs()), prune_inputs=True), hard=False)
    for name, net in (("residual", gated), ("inputs", flat)):
        x = random_inputs(net)
        compact(net).save(tmp_path / f"{name}.keras")
        arrays = x if isinstance(x, dict) else {"x": x}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        outputs = keras.tree.flatten(net(x))
        np.savez(tmp_path / f"{name}_out.npz", **{str(k): y for k, y in enumerate(outputs)})
    script = textwrap.dedent("""
        import sys
        import keras, numpy as np
        for name in ("residual", "inputs"):
            model = keras.saving.load_model(f"{sys.argv[1]}/{name}.keras")
            data = dict(np.load(f"{sys.argv[1]}/{name}.npz"))
            found = keras.tree.flatten(model(data if "x" not in data else data["x"]))
            expected = np.load(f"{sys.argv[1]}/{name}_out.npz")
            for k, y in enumerate(found):
                np.testing.assert_allclose(y, expected[str(k)], rtol=1e-4, atol=1e-5)
        assert not [m for m in sys.modules if m.startswith("tf_kfacprune")]
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_layers_keep_their_names_and_no_weights_are_shared():
    model = lenet5()
    gated = set_gates(insert_gates(model), hard=True)
    small = compact(gated)
    assert [layer.name for layer in small.layers[1:]] == [layer.name for layer in model.layers]
    before = [np.array(w.numpy()) for w in model.weights]
    for weight in small.weights:
        weight.assign(weight + 1.0)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_equal_names_in_nested_models_are_told_apart_with_a_warning():
    with pytest.warns(UserWarning, match="'hidden' to 'right_hidden'"):
        gated = insert_gates(same_names_in_nested_models())
    small = compact(set_gates(gated, hard=False))
    assert {"hidden", "right_hidden"} <= {layer.name for layer in small.layers}


def test_every_group_keeps_at_least_one_neuron():
    gated = insert_gates(lenet5())
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(np.zeros(bank.size))
    small = compact(gated)
    assert [layer.filters for layer in small.layers if hasattr(layer, "filters")] == [1, 1]


def test_input_features_are_picked_behind_the_input():
    model = keras.Sequential([keras.Input((9,)), layers.Dense(4), layers.Dense(2)])
    gated = insert_gates(model, prune_inputs=True)
    (bank,) = GatedNetwork(gated).sources
    values = np.ones(bank.size)
    values[[0, 1, 5]] = 0
    bank.set_values(values)
    small = compact(gated)
    assert small.input_shape == (None, 9)
    assert small.get_layer(model.layers[0].name).kernel.shape == (6, 4)
    report = compaction_report(gated, small)["layers"][gated.inputs[0].name]
    assert report == {"channels": 9, "kept": [2, 3, 4, 6, 7, 8]}


def by_hand():
    inputs = keras.Input((8, 8, 2))
    x = GatedConv2D(6, 3, activation="relu", name="first")(inputs)
    x = layers.BatchNormalization()(x)
    shortcut = x
    x = NeuronGate(name="middle_gate")(x)
    x = layers.Conv2D(6, 3, padding="same", activation="sigmoid", name="middle")(x)
    x = layers.Add()([shortcut, x])
    x = NeuronGate(name="late_gate")(layers.ReLU()(x))
    x = layers.Flatten()(layers.MaxPooling2D()(x))
    x = layers.Dense(7, name="dense")(x)
    return keras.Model(inputs, GatedDense(3, name="last")(layers.Activation("tanh")(x)))


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_models_gated_by_hand_are_compacted(hard):
    net = set_gates(randomize(by_hand()), hard)
    network = GatedNetwork(net)
    small = compact(net, verify=False)
    x = random_inputs(net)
    assert parity_error(net(x), small(x)) <= 2e-6
    assert not package_classes(small)
    assert {"first", "middle", "dense", "last"} <= {layer.name for layer in small.layers}
    residual_neurons = network.channels.groups[1]
    middle, late = (source.deterministic_values() for source in network.sources[1:3])
    expected = int(np.sum((np.asarray(middle) > 0) | (np.asarray(late) > 0)))
    assert small.get_layer("middle").filters == expected
    assert residual_neurons.producers == ("first", "middle")


def test_gated_dense_on_its_own_features():
    inputs = keras.Input((10,))
    net = keras.Model(inputs, GatedDense(3)(GatedDense(8, activation="relu")(inputs)))
    small = compact(set_gates(net, hard=False))
    assert small.count_params() < 10 * 8 + 8 + 8 * 3 + 3


def test_a_shared_gated_layer_is_compacted_also_inside_a_nested_model():
    inputs, inner_inputs = keras.Input((6,)), keras.Input((6,))
    shared = GatedDense(6, activation="relu", name="shared")
    inner = keras.Model(inner_inputs, layers.BatchNormalization()(shared(inner_inputs)))
    x = shared(inner(shared(inputs)))
    net = set_gates(keras.Model(inputs, GatedDense(3)(x)), hard=False)
    network = GatedNetwork(net)
    (group,) = network.channels.groups
    assert group.producers[1:] == ("shared",)
    params = network.cost.count("params", network.kept_neurons())
    assert compact(net).count_params() == params < network.cost.params_dense


def test_a_shared_layer_behind_different_soft_gates_is_refused():
    inputs = keras.Input((5,))
    shared = layers.Dense(5, activation="relu", name="shared")
    x = shared(NeuronGate(name="a")(inputs))
    x = shared(NeuronGate(name="b")(x))
    net = set_gates(keras.Model(inputs, GatedDense(2)(x)), hard=False)
    with pytest.raises(UnsupportedModelError, match="'shared' is shared"):
        compact(net)


def test_a_mismatch_raises_with_the_error_found():
    gated = set_gates(insert_gates(lenet300()), hard=False)
    other = compact(gated)
    other.layers[-1].bias.assign(other.layers[-1].bias + np.eye(4, dtype="float32")[0])
    with pytest.raises(ParityError, match="relative error"):
        verify_parity(gated, other)


def test_verification_uses_the_data_it_is_given():
    gated = set_gates(insert_gates(lenet300()), hard=False)
    with pytest.raises(ParityError, match="verify_data"):
        compact(gated, verify_data=np.full((2, 6, 6, 1), np.nan), tolerance=-1.0)


def test_report_of_another_model_is_refused():
    gated = set_gates(insert_gates(lenet300()), hard=False)
    with pytest.raises(InvalidArgumentError, match="was made from"):
        compaction_report(gated, lenet5())


def test_ungated_models_and_other_objects_are_refused():
    with pytest.raises(UnsupportedModelError, match="has no gates"):
        compact(lenet5())
    with pytest.raises(InvalidArgumentError, match="Received: 3"):
        compact(3)


def test_layers_called_with_keyword_arguments_are_compacted():
    inputs = keras.Input((9,))
    x = layers.Dense(6, activation="relu")(inputs=inputs)
    model = keras.Model(inputs, layers.Dense(2)(inputs=x))
    small = compact(set_gates(insert_gates(model, prune_inputs=True), hard=False))
    assert small.count_params() < model.count_params()


@keras.saving.register_keras_serializable("tests")
class ChannelScale(layers.Layer):
    """A layer of the user's own, with one weight per channel."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels

    def build(self, input_shape):
        self.factor = self.add_weight(shape=(self.channels,), initializer="normal", name="factor")

    def call(self, x):
        return x * self.factor

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


@register_channel_rule(ChannelScale)
class ChannelScaleRule(ChannelRule):
    weights: ClassVar = {"factor": ("channels",)}
    sizes: ClassVar = {"channels": "channels"}

    def propagate(self, call, flow):
        axes = flow.of(call.inputs[0])
        flow.role(call.operation, "channels", axes[-1], call.path)
        return [axes]


def test_a_layer_with_a_registered_rule_is_made_smaller():
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(8), ChannelScale(8, name="scale"), layers.Dense(2)]
    )
    gated = set_gates(insert_gates(model), hard=True)
    small = compact(gated)
    kept = int(GatedNetwork(gated).kept_neurons().sum())
    assert small.get_layer("scale").factor.shape == (kept,) != (8,)


@keep_opaque
class Unconfigurable(layers.Layer):
    """Does not survive its own config, like some layers of Keras."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def test_untouched_layers_that_cannot_be_copied_are_used_as_they_are():
    inputs = keras.Input((5,))
    x = layers.Dense(4, name="frozen")(inputs)
    x = Unconfigurable(keras.ops.sin, name="mine")(x)
    x = layers.Dense(6, activation="relu")(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    small = compact(set_gates(insert_gates(model), hard=False))
    assert small.get_layer("mine") is model.get_layer("mine")


def test_a_model_wrapper_without_gates_is_copied_whole():
    class Wrapper:
        net = lenet300()
        gated = None

    small = compact(Wrapper())
    assert small.count_params() == Wrapper.net.count_params()


def test_settled_gates_of_training_survive_a_round_trip(tmp_path):
    gated = set_gates(insert_gates(lenet300(), prune_inputs=True), hard=False)
    assert int(GatedNetwork(gated).sources[0].phase.numpy()) == GatePhase.SETTLED
    gated.save(tmp_path / "gated.keras")
    loaded = keras.saving.load_model(tmp_path / "gated.keras")
    x = random_inputs(gated)
    assert parity_error(compact(gated)(x), compact(loaded)(x)) == 0
