"""Input scaling and decisions inside the exported model."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export import run_tflite, tflite, with_head

X = np.random.default_rng(0).integers(0, 256, (20, 6)).astype("float32")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((6,), name="pixels"), keras.layers.Dense(4)])


def logits(model):
    return keras.ops.convert_to_numpy(model(X / 255 - 0.5))


def test_head_and_scaling_are_computed_inside(model):
    reference = logits(model)
    plain = with_head(model, scale=1 / 255, offset=-0.5)
    np.testing.assert_allclose(plain(X), reference, rtol=1e-5, atol=1e-6)
    probabilities = keras.ops.convert_to_numpy(
        with_head(model, "softmax", scale=1 / 255, offset=-0.5)(X)
    )
    exponentials = np.exp(reference.astype("float64"))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_file_with_argmax_returns_class_numbers(model, tmp_path):
    decided = with_head(model, "argmax", scale=1 / 255, offset=-0.5)
    path = tflite(decided, tmp_path / "net.tflite", verify_data=X)
    classes = run_tflite(path, {"pixels": X})["output"]
    assert classes.dtype == np.int32
    np.testing.assert_array_equal(classes, logits(model).argmax(axis=1))


def test_weights_are_shared(model):
    assert with_head(model, "softmax").count_params() == model.count_params()
    assert with_head(model, "softmax").trainable_variables[0] is model.trainable_variables[0]


def test_bad_options_are_refused(model):
    with pytest.raises(InvalidArgumentError, match="'sigmoid'"):
        with_head(model, "sigmoid")
    for options in [{"scale": 0.0}, {"scale": np.nan}, {"offset": np.inf}]:
        with pytest.raises(InvalidArgumentError, match="finite"):
            with_head(model, **options)


def test_several_outputs_are_refused():
    x = keras.Input((3,))
    model = keras.Model(x, [keras.layers.Dense(2)(x), x])
    with pytest.raises(UnsupportedModelError, match="1 inputs and 2 outputs"):
        with_head(model, "softmax")
