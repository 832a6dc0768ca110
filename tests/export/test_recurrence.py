"""Recurrent networks: the advice of each refusal, followed until the file runs."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export import run_tflite, tflite

L = keras.layers
X = np.random.default_rng(0).normal(size=(24, 5, 3)).astype("float32")


def network(layer, **options):
    x = keras.Input((5, 3), name="x")
    return keras.Model(x, L.Dense(2)(layer(4, name="recurrent", **options)(x)))


@pytest.fixture(scope="module", params=[L.LSTM, L.GRU], ids=["LSTM", "GRU"])
def trained(request):
    """A rolled network, its class, and what it computes."""
    keras.utils.set_random_seed(0)
    model = network(request.param)
    return request.param, model, keras.ops.convert_to_numpy(model(X))


def error(path, expected):
    found = run_tflite(path, X)
    return np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))


def test_rolled_network_runs_with_the_batch_size_that_its_refusal_asks_for(trained, tmp_path):
    _, model, expected = trained
    path = tmp_path / "net.tflite"
    with pytest.raises(InvalidArgumentError, match=r"'recurrent'.*Pass batch_size=1, or"):
        tflite(model, path, verify_data=X)
    assert error(tflite(model, path, batch_size=1, verify_data=X), expected) < 1e-5


def test_unrolled_network_with_the_same_weights_runs_in_float32_and_int8(trained, tmp_path):
    layer, model, expected = trained
    data = {"representative_data": X, "quantization": "int8"}
    with pytest.raises(UnsupportedModelError, match=r"'recurrent'.*unroll=True.*set_weights"):
        tflite(model, tmp_path / "net.tflite", batch_size=1, **data)
    unrolled = network(layer, unroll=True)
    unrolled.set_weights(model.get_weights())
    path = tflite(unrolled, tmp_path / "float.tflite", verify_data=X)
    assert error(path, expected) < 1e-5
    path = tflite(unrolled, tmp_path / "int8.tflite", batch_size=1, **data)
    assert error(path, expected) < 0.05


def test_dynamic_with_batch_size_1_runs_as_its_refusal_says(trained, tmp_path):
    _, model, expected = trained
    with pytest.raises(UnsupportedModelError, match="'dynamic' with batch_size=1"):
        tflite(model, tmp_path / "n.tflite", quantization="int16x8", representative_data=X)
    path = tflite(model, tmp_path / "n.tflite", quantization="dynamic", batch_size=1, verify_data=X)
    assert error(path, expected) < 0.05
