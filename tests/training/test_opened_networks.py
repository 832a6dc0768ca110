"""Networks of custom layers: trained, saved in the middle, reloaded; the user's own model, too."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tests.graph import custom_layers as custom
from tf_kfacprune.gates import GatePhase

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LENGTH, CLASSES = 5, 3


def custom_network():
    """Nested custom layers with normalization, dropout and weights of their own."""
    inputs = keras.Input((LENGTH,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(9, 6, name="table")(inputs)
    x = custom.Block(5, name="block")(custom.FeedForward(7, name="ffn")(x))
    x = keras.layers.GlobalAveragePooling1D(name="mean")(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x))


def bert():
    """A backbone of keras_hub with a Dense layer behind it."""
    keras_hub = pytest.importorskip("keras_hub")
    inputs = keras.Input((LENGTH,), dtype="int32", name="tokens")
    size = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}
    backbone = keras_hub.models.BertBackbone(9, max_sequence_length=LENGTH, **size)
    ones = keras.ops.ones_like(inputs)
    read = {"token_ids": inputs, "padding_mask": ones, "segment_ids": ones - ones}
    logits = keras.layers.Dense(CLASSES, name="head")(backbone(read)["pooled_output"])
    return keras.Model(inputs, logits)


def data():
    x = np.random.default_rng(0).integers(0, 9, (96, LENGTH)).astype("int32")
    return x, x.sum(axis=1) % CLASSES


@pytest.fixture(scope="module", params=[custom_network, bert], ids=["custom", "keras_hub"])
def trained(request, tmp_path_factory):
    """The user's model, what it was trained by, and the folder of the state after every epoch."""
    keras.utils.set_random_seed(0)
    model = request.param()
    folder = tmp_path_factory.mktemp("states")
    phases = kp.Phases(warmup=0.0, prune=0.7)
    pm = kp.PrunableModel(model, budget=kp.Budget(macs=0.5), phases=phases, seed=0)
    pm.compile(kp.KFAC(1e-2, labels="data"), LOSS, run_eagerly=True)
    saving = keras.callbacks.ModelCheckpoint(str(folder / "{epoch}.keras"))
    pm.fit(*data(), batch_size=32, epochs=3, shuffle=False, verbose=0, callbacks=[saving])
    return model, pm, folder


CUSTOM = {"Block": custom.Block, "FeedForward": custom.FeedForward, "Scale": custom.Scale}


@pytest.mark.slow
def test_a_reloaded_model_goes_on_as_if_nothing_had_happened(trained):
    _, pm, folder = trained
    resumed = keras.saving.load_model(folder / "2.keras")
    assert int(resumed.controller.phase()) == GatePhase.PRUNING
    options = {"initial_epoch": 2, "epochs": 3, "shuffle": False, "verbose": 0}
    resumed.fit(*data(), batch_size=32, **options)
    for a, b in zip(pm.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def test_a_trained_and_reloaded_model_is_compacted(trained, tmp_path):
    model, pm, _ = trained
    x, _ = data()
    pm.save(tmp_path / "pm.keras")
    small = kp.compact(keras.saving.load_model(tmp_path / "pm.keras"))
    assert kp.inspect(small).macs <= 0.5 * kp.inspect(model).macs
    np.testing.assert_allclose(small(x), pm(x), atol=1e-5)
    small.save(tmp_path / "small.keras")
    reloaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(reloaded(x), small(x))


@pytest.mark.slow
def test_the_users_own_model_has_the_trained_weights_and_is_saved_as_ever(trained, tmp_path):
    model, pm, _ = trained
    kept = {id(weight) for weight in pm.net.weights}
    assert all(id(weight) in kept for weight in model.trainable_weights)
    model.save(tmp_path / "own.keras")
    reloaded = keras.saving.load_model(tmp_path / "own.keras", custom_objects=CUSTOM)
    assert [w.path for w in reloaded.weights] == [w.path for w in model.weights]
    x, _ = data()
    np.testing.assert_array_equal(reloaded(x), model(x))
    again = kp.PrunableModel(reloaded, budget=kp.Budget(macs=0.5), seed=0)
    assert again.gated.kept_neurons().size == pm.gated.kept_neurons().size
