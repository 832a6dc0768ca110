"""Shapes and element types that differ from those of the first call."""

from __future__ import annotations

import keras
import pytest
from keras import layers, ops

import tf_kfacprune as kp
from tf_kfacprune.graph import analyze, reasons


def test_inspect_where_a_float16_embedding_meets_a_float32_layer():
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 6, dtype="float16", name="embedding")(tokens)
    y = layers.Dense(6, name="dense")(layers.Identity(dtype="float32")(x))
    x = layers.Add(dtype="float32")([x, y])
    model = keras.Model(tokens, layers.Dense(2)(x))
    inspection = kp.inspect(model)
    assert [group.name for group in inspection.groups] == ["embedding"]
    assert inspection.macs == 128 * (6 * 6 + 6 * 2)


def reshaped(batch, target):
    inputs = keras.Input(batch_shape=(batch, 4, 3))
    x = ops.reshape(layers.Dense(6, name="dense")(inputs), target)
    return keras.Model(inputs, layers.Dense(2)(x))


@pytest.mark.parametrize(
    ("batch", "target", "neurons"),
    [
        (8, (8, 2, 12), 6),  # positions 2k and 2k + 1 side by side: a channel goes from both
        (8, (8, 4, 2, 3), 0),  # heads of 3: 2 heads, which the last Dense does not read
        (8, (32, 6), 6),  # batch and positions together
        (8, (-1, 6), 6),
        (None, (-1, 6), 6),
        (None, (-1, 24), 6),
    ],
)
def test_reshape_with_a_fixed_batch_size(batch, target, neurons):
    assert analyze(reshaped(batch, target)).num_neurons == neurons


def test_channels_that_can_only_go_together_are_not_called_a_single_neuron():
    inputs = keras.Input((4,))
    x = layers.Dense(16, name="wide")(inputs)
    x = ops.reshape(x, (-1, 1, 16))
    x = layers.Conv1D(1, 1, name="one")(x)
    first, *_ = analyze(keras.Model(inputs, layers.Dense(2)(x + x))).frozen
    assert (first.layer, first.reason) == ("one", reasons.ONLY_NEURON)
    y = layers.Dense(16, name="tied")(inputs)
    y = ops.reshape(y, (-1, 16, 1)) * ops.ones((1, 1, 1))
    y = ops.reshape(ops.repeat(y, 2, axis=2), (-1, 2, 16))
    (tied, *_) = analyze(keras.Model(inputs, layers.Dense(2)(y))).frozen
    assert tied.layer == "tied"
    assert tied.channels == 16
    assert tied.reason in (reasons.ALL_COUPLED, reasons.MIXED_AXES)
