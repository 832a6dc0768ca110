"""Networks that pick flattened features, in every format."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.export import run_tflite, saved_model, tflite
from tf_kfacprune.export.running import run_saved_model


@pytest.fixture(scope="module")
def pruned():
    """A model that has landed by scores at random, as it comes back from a file."""
    keras.utils.set_random_seed(0)
    image = keras.Input((10, 9, 1), name="image")
    x = layers.Conv2D(6, 3, activation="relu", name="conv")(image)
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Dropout(0.3, name="dropout")(layers.Flatten(name="flatten")(x))
    x = layers.Dense(20, activation="relu", name="fc")(x)
    network = keras.Model(image, layers.Dense(3, name="logits")(x), name="net")
    model = kp.PrunableModel(
        network, kp.Budget(params=0.4), prune_features=True, policy="random", seed=0
    )
    model.controller.land()
    return model


def images(count=8):
    return np.random.default_rng(1).normal(size=(count, 10, 9, 1)).astype("float32")


@pytest.fixture(scope="module")
def small(pruned):
    small = kp.compact(pruned)
    (features,) = (group for group in pruned.gated.channels.groups if group.name == "flatten")
    left = small.get_layer("fc").kernel.shape[0]
    assert left == pruned.gated.kept_neurons()[features.neurons].sum()
    assert left < np.prod(small.get_layer("pool").output.shape[1:])
    return small


def test_a_model_with_gates_of_features_comes_back_from_its_file(pruned, small, tmp_path):
    pruned.save(tmp_path / "pruned.keras")
    back = keras.models.load_model(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(back.predict(images(), verbose=0), pruned(images()))
    np.testing.assert_array_equal(kp.compact(back)(images()), small(images()))


@pytest.mark.slow
def test_the_saved_model_picks_features(small, tmp_path):
    folder = saved_model(small, tmp_path / "net")
    found = run_saved_model(folder, {"image": images()})["output"]
    np.testing.assert_allclose(found, small(images()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, "float16", "dynamic", "int8"])
def test_files_pick_features(small, quantization, tmp_path):
    data = images(200) if quantization == "int8" else None
    path = tflite(
        small, tmp_path / "net.tflite", quantization=quantization, representative_data=data
    )
    expected = small.predict(images(), verbose=0)
    error = np.abs(run_tflite(path, images()) - expected).max() / np.abs(expected).max()
    assert error < (0.06 if quantization == "int8" else 0.02)
