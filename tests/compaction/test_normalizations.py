from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_kfacprune.compaction import parity_error, random_inputs
from tf_kfacprune.gates import GateAware, GatedNetwork, insert_gates
from tf_kfacprune.graph import analyze, reasons


def convnet(*middle):
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(12, 3, padding="same", activation="relu", name="first")(inputs)
    for layer in middle:
        x = layer(x)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 1, name="second")(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


NORMS = {
    "layer": lambda: layers.LayerNormalization(),
    "layer, plain": lambda: layers.LayerNormalization(center=False, scale=False, epsilon=0.1),
    "rms": lambda: layers.RMSNormalization(epsilon=0.1),
    "unit": lambda: layers.UnitNormalization(),
    "one group": lambda: layers.GroupNormalization(groups=1, epsilon=0.1),
    "one group, plain": lambda: layers.GroupNormalization(groups=1, center=False, scale=False),
    "groups": lambda: layers.GroupNormalization(groups=4),
    "instance": lambda: layers.GroupNormalization(groups=-1),
}


@pytest.mark.parametrize("norm", NORMS)
def test_compact_equals_gated_behind_a_normalization(norm, assert_exact):
    model = convnet(NORMS[norm]())
    assert analyze(model).frozen == analyze(convnet()).frozen
    assert_exact(model)


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
def test_compact_equals_gated_with_the_old_rms_scaling(assert_exact):
    assert_exact(convnet(layers.LayerNormalization(rms_scaling=True)))


def test_compact_equals_gated_in_channels_first_layouts(assert_exact):
    inputs = keras.Input((12, 4, 4))
    x = layers.Permute((3, 1, 2))(layers.Dense(12)(layers.Permute((2, 3, 1))(inputs)))
    x = layers.GroupNormalization(groups=1, axis=1)(layers.LayerNormalization(axis=1)(x))
    x = layers.Dense(3)(layers.GlobalAveragePooling2D(data_format="channels_first")(x))
    model = keras.Model(inputs, x)
    assert analyze(model).num_neurons == 12
    assert_exact(model)


def test_statistics_count_the_neuron_that_stays_of_a_closed_group(assert_exact):
    """A norm over two groups, one of them closed: one neuron of it stays, gated to zero."""
    inputs = keras.Input((5,))
    a, b = layers.Dense(4, name="a")(inputs), layers.Dense(6, name="b")(inputs)
    x = layers.LayerNormalization()(layers.Concatenate()([a, b]))
    model = keras.Model(inputs, layers.Dense(2)(x))
    gated = assert_exact(model)
    (bank,) = GatedNetwork(gated).sources
    bank.set_values([0.0] * 4 + [1.0] * 3 + [0.0] * 3)
    _, present = bank(np.zeros((1, 5)))
    np.testing.assert_array_equal(present, [1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0])


def test_a_shared_normalization_couples_its_calls(assert_exact):
    inputs = keras.Input((5,))
    norm = layers.LayerNormalization()
    a, b = norm(layers.Dense(8)(inputs)), norm(layers.Dense(8)(inputs))
    model = keras.Model(inputs, layers.Dense(2)(layers.Concatenate()([a, b])))
    assert [group.size for group in analyze(model).groups] == [8]
    assert_exact(model)


def test_residual_streams_with_normalization_are_prunable(assert_exact):
    inputs = keras.Input((7, 5))
    x = layers.Dense(12, name="embed")(inputs)
    for k in range(2):
        y = layers.LayerNormalization()(x)
        y = layers.Dense(16, activation="gelu", name=f"wide{k}")(y)
        x = x + layers.Dense(12, name=f"narrow{k}")(y)
    x = ops.mean(layers.RMSNormalization()(x), axis=1)
    model = keras.Model(inputs, layers.Dense(3)(x))
    assert {group.name: group.size for group in analyze(model).groups} == {
        "embed": 12,
        "wide0": 16,
        "wide1": 16,
    }
    assert_exact(model)


def test_normalization_over_several_axes_is_frozen_with_the_reason():
    channels = analyze(convnet(layers.LayerNormalization(axis=(1, 2, 3))))
    assert {f.layer: f.reason for f in channels.frozen}["first"] == (
        reasons.NORMALIZED_ACROSS_CHANNELS
    )


def test_half_precision_is_unchanged_by_open_gates():
    for norm in NORMS.values():
        inputs = keras.Input((5,))
        x = layers.Dense(12, dtype="mixed_float16")(inputs)
        layer = norm()
        layer = type(layer).from_config({**layer.get_config(), "dtype": "mixed_float16"})
        model = keras.Model(inputs, layers.Dense(2, dtype="mixed_float16")(layer(x)))
        gated, data = insert_gates(model), random_inputs(model)
        assert parity_error(model(data), gated(data)) == 0


def test_no_gradient_reaches_the_gates_through_the_statistics():
    import tensorflow as tf

    model = convnet(layers.LayerNormalization())
    gated = insert_gates(model)
    (bank,) = GatedNetwork(gated).sources
    wrapper = next(layer for layer in gated.layers if isinstance(layer, GateAware))
    with tf.GradientTape() as tape:
        z, present = bank(np.zeros((1, 4, 4, 3)))
        y = wrapper(tf.ones((2, 4, 4, 12)), gates=[z, present])
    assert tape.gradient(y, bank.parameters.value) is None
