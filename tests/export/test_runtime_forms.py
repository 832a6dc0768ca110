"""Layers that are exported by other operations than those Keras calls."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.export import run_tflite, tflite
from tf_kfacprune.export.model_graph import read_graph

L = keras.layers


class Doubled(L.UpSampling2D):
    """A subclass may do something else, and is left alone."""

    def call(self, inputs):
        return 2.0 * super().call(inputs)


def network(upsampling):
    inputs = keras.Input((4, 5, 2), name="image")
    inner = keras.Sequential([keras.Input((4, 5, 3)), upsampling])  # layers of models inside, too
    return keras.Model(inputs, inner(L.Conv2D(3, 3, padding="same")(inputs)))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_repeated_pixels_are_one_operation_with_equal_values(tmp_path, batch_size):
    model = network(L.UpSampling2D((3, 2), name="up"))
    path = tmp_path / "net.tflite"
    tflite(model, path, batch_size=batch_size)
    operators = [op.operator for op in read_graph(path.read_bytes()).operations]
    assert operators == ["CONV_2D", "RESIZE_NEAREST_NEIGHBOR"]
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype("float32")
    expected = model.predict(x, verbose=0)
    (found,) = run_tflite(path, {"image": x}).values()
    assert found.shape == expected.shape == (1, 12, 10, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    again = model.predict(x, verbose=0)  # the model is as it was
    np.testing.assert_array_equal(again, expected)
    assert "call" not in vars(model.layers[-1].layers[0])


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "causal", "dilation_rate": 2, "activation": "relu"},
        {"padding": "same", "strides": 2, "activation": "sigmoid"},
        {},
    ],
    ids=["causal", "strided", "plain"],
)
def test_the_bias_of_a_single_filter_is_a_part_of_the_convolution(tmp_path, options):
    layer = L.Conv1D(1, 3, bias_initializer="ones", **options)
    model = keras.Sequential([keras.Input((9, 4)), layer])
    path = tmp_path / "net.tflite"
    tflite(model, path, batch_size=1)
    operators = [op.operator for op in read_graph(path.read_bytes()).operations]
    assert "ADD" not in operators
    x = np.random.default_rng(0).normal(size=(1, 9, 4)).astype("float32")
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(run_tflite(path, x), expected, atol=1e-5)


def test_layers_of_ones_own_are_exported_as_they_are(tmp_path):
    model = network(Doubled((3, 2), name="up"))
    tflite(model, tmp_path / "net.tflite", batch_size=1)  # verified against the model
    graph = read_graph((tmp_path / "net.tflite").read_bytes())
    assert "RESIZE_NEAREST_NEIGHBOR" not in graph.operators
