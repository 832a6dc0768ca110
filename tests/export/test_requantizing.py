"""Weights in four bits, or in eight without integer arithmetic."""

from __future__ import annotations

import importlib.util
import sys

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export import run_tflite, tflite

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_quantizer") is None,
    reason="needs the extra: pip install .[quantizer]",
)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 2), name="image")
    x = keras.layers.Conv2D(16, 3, activation="relu")(image)
    x = keras.layers.Dense(64, activation="relu")(keras.layers.Flatten()(x))
    return keras.Model(image, keras.layers.Dense(10)(x))


@pytest.mark.slow
@needs_extra
def test_fewer_bits_make_smaller_files_that_agree(model, tmp_path, capfd):
    x = np.random.default_rng(0).normal(size=(50, 8, 8, 2)).astype("float32")
    expected = model.predict(x, verbose=0)
    capfd.readouterr()
    sizes, errors = {}, {}
    for quantization in (None, "weight_only", "int4"):
        file = tflite(
            model, tmp_path / f"{quantization}.tflite", quantization=quantization, verify_data=x
        )
        sizes[quantization] = file.stat().st_size
        error = run_tflite(file, x) - expected
        errors[quantization] = np.sqrt(np.mean(error**2) / np.mean(expected**2))
    assert capfd.readouterr() == ("", "")
    assert sizes["int4"] < 0.65 * sizes["weight_only"] < 0.3 * sizes[None]
    assert errors[None] < 1e-6 < errors["weight_only"] < 0.02 < errors["int4"] < 0.3


def test_missing_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(ExportError, match=r"pip install 'tf_kfacprune\[quantizer\]'"):
        tflite(model, tmp_path / "net.tflite", quantization="int4")
    assert not list(tmp_path.iterdir())
