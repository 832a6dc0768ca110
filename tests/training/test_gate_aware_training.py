"""Transformers and recurrent networks: trained with a budget, compacted, equal, exported."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.curvature import (
    Batch,
    CurvatureEstimator,
    SingleObjective,
    check_second_derivatives,
    find_blocks,
    mends,
)
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import GateAware

LOSS = "sparse_categorical_crossentropy"


def vision_transformer(norm=layers.LayerNormalization):
    keras.utils.set_random_seed(3)
    images = keras.Input((8, 8, 2))
    x = layers.Conv2D(12, 4, strides=4, name="patches")(images)
    x = layers.Reshape((4, 12))(x)
    y = norm(name="norm")(x)
    x = layers.Add()([x, layers.MultiHeadAttention(3, 4, name="attention")(y, y)])
    y = layers.Dense(20, activation="gelu", name="wide")(norm(name="mlp_norm")(x))
    x = layers.Add()([x, layers.Dense(12, name="narrow")(y)])
    x = layers.GlobalAveragePooling1D()(norm(name="last_norm")(x))
    return keras.Model(images, layers.Dense(3, activation="softmax", name="head")(x))


def text_classifier():
    keras.utils.set_random_seed(3)
    tokens = keras.Input((9,), dtype="int32")
    x = layers.Embedding(20, 12, mask_zero=True, name="embedding")(tokens)
    x = layers.Bidirectional(layers.LSTM(8), name="both")(x)
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(tokens, layers.Dense(3, activation="softmax", name="head")(x))


def images(n=256):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 8, 8, 2)).astype("float32")
    return x, (x[:, :4].mean((1, 2, 3)) > 0).astype("int32") + (x[:, :, 4:].mean((1, 2, 3)) > 0)


def sentences(n=256):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 20, (n, 9)) * (np.arange(9) < rng.integers(4, 10, (n, 1)))
    return x.astype("int32"), (x == 3).any(1).astype("int32") + (x == 5).any(1)


CASES = {"vision": (vision_transformer, images), "text": (text_classifier, sentences)}


def fit(model, data, epochs=3):
    """Eager, as tracing takes longer than twelve steps."""
    model.compile(kp.KFAC(0.02), LOSS, run_eagerly=True)
    return model.fit(*data, batch_size=64, epochs=epochs, verbose=0).history


def outputs(model, x):
    return np.asarray(model(x, training=False))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vision", "text"])
def test_training_lands_within_the_budget_and_compacts_to_the_same_function(case, tmp_path):
    build, data = CASES[case]
    model = kp.PrunableModel(build(), budget=kp.Budget(macs=0.5), seed=0)
    history = fit(model, data())
    assert history["macs"][-1] <= 0.5
    assert np.isfinite(history["loss"]).all()
    small, x = kp.compact(model), data()[0]
    assert small.count_params() < build().count_params()
    assert not [layer for layer in small.layers if isinstance(layer, GateAware)]
    np.testing.assert_allclose(outputs(small, x), outputs(model, x), atol=1e-5)
    for trained in (model, small):
        trained.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(outputs(loaded, x), outputs(trained, x))
    if case == "vision":  # the export compares the file with the model
        kp.export.tflite(small, tmp_path / "small.tflite", batch_size=1)


@pytest.mark.parametrize("case", ["text", pytest.param("vision", marks=pytest.mark.slow)])
def test_held_open_gates_do_not_change_training(case):
    build, data = CASES[case]
    losses = []
    for wrap in (lambda m: m, lambda m: kp.PrunableModel(m, budget=kp.Budget(macs=1.0))):
        model = wrap(build())
        model.compile(keras.optimizers.SGD(0.1), LOSS)
        history = model.fit(*data(128), batch_size=32, epochs=1, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_every_wrapped_layer_has_a_block_or_a_reason():
    model = kp.PrunableModel(vision_transformer(), budget=kp.Budget(macs=0.5))
    model.compile(kp.KFAC(0.02), LOSS)
    lines: list[str] = []
    model.optimizer.summary(lines.append)
    wrapped = [layer for layer in model.net.layers if isinstance(layer, GateAware)]
    assert {layer.name for layer in wrapped} == {"norm", "attention", "mlp_norm", "last_norm"}
    assert all(any(layer.name in line for line in lines) for layer in wrapped)


def test_attention_has_the_factors_it_has_without_gates():
    """Gates stand around the projections: open ones change no factor, closed ones cut gradients."""
    plain = vision_transformer(layers.RMSNormalization)
    gated = kp.PrunableModel(plain, budget=kp.Budget(macs=0.5)).net
    x = images(16)[0]

    def factors(net):
        blocks = [b for b in find_blocks(net).blocks if b.name.startswith("attention/")]
        estimator = CurvatureEstimator(net, SingleObjective("mse"))
        batch = Batch(x, np.zeros((16, 3), "float32"))
        look = estimator.look(batch, blocks, "exact", training=False)
        return {b.name: [np.asarray(f) for f in b.factors(look.of(b.layer))] for b in blocks}

    expected, found = factors(plain), factors(gated)
    assert set(found) == {f"attention/{part}" for part in ("query", "key", "value", "output")}
    for name, pair in expected.items():
        for a, b in zip(pair, found[name], strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-7)
    bank = gated.get_layer("gates")
    closed = next(k for k, (name, _) in enumerate(bank.groups) if name.endswith("key_dim"))
    values = np.ones(bank.size)
    values[sum(bank.group_sizes[:closed])] = 0
    bank.set_values(values)
    g = factors(gated)["attention/query"][1].reshape(3, 4, 3, 4)  # head, dimension, twice
    assert (g[:, 0] == 0).all()
    assert (np.diagonal(g[:, 1, :, 1]) > 0).all()


@pytest.mark.slow
def test_the_spectral_radius_is_penalized_through_wrapped_layers():
    model = kp.PrunableModel(
        vision_transformer(layers.RMSNormalization),
        budget=kp.Budget(macs=0.5),
        curvature=kp.SpectralRadius(1e-3),
        seed=0,
    )
    assert np.isfinite(fit(model, images(64))["loss"]).all()


def test_layers_without_second_derivatives_are_found_and_mended_inside_wrappers():
    net = kp.PrunableModel(vision_transformer(), kp.Budget(macs=0.5)).net
    with pytest.raises(UnsupportedModelError, match=r"'last_norm' \(LayerNormalization\)"):
        check_second_derivatives(net, training=True)
    check_second_derivatives(net, training=True, mended=mends)
