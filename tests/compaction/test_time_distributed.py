"""`TimeDistributed` layers are pruned like the layers they wrap."""

from __future__ import annotations

import keras
import pytest
from keras import layers

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import GatedNetwork, NeuronGate
from tf_kfacprune.graph import CostModel, analyze, reasons


def video(*wrapped):
    """Convolutions on every frame, then a reader of the sequence."""
    inputs = keras.Input((4, 6, 6, 2))
    x = layers.TimeDistributed(layers.Conv2D(6, 3, activation="tanh", name="inner"), name="conv")(
        inputs
    )
    for layer in wrapped:
        x = layers.TimeDistributed(layer)(x)
    if len(x.shape) > 3:
        x = layers.TimeDistributed(layers.Flatten())(x)
    x = layers.TimeDistributed(layers.Dense(5, activation="relu"), name="dense")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalAveragePooling1D()(x)))


CASES = {
    "flatten": lambda: video(),
    "normalized": lambda: video(layers.BatchNormalization(), layers.LeakyReLU()),
    "pooled": lambda: video(layers.MaxPooling2D(2), layers.GlobalAveragePooling2D()),
    "grouped": lambda: video(layers.Conv2D(8, 1, groups=2, activation="relu")),
    "depthwise": lambda: video(layers.DepthwiseConv2D(2, depth_multiplier=2)),
    "separable": lambda: video(layers.SeparableConv2D(5, 2, activation="relu")),
    "transposed": lambda: video(layers.Conv2DTranspose(5, 2, activation="relu")),
    "reshaped": lambda: video(layers.Reshape((16, 6)), layers.Conv1D(4, 3, activation="relu")),
}


@pytest.mark.parametrize("case", CASES)
def test_compact_equals_gated(case, assert_exact):
    model = CASES[case]()
    assert {record.layer for record in analyze(model).frozen} == {"head"}
    assert_exact(model)


def test_macs_count_every_step():
    cost = CostModel(analyze(video()))
    assert cost.macs_dense == 4 * (16 * 9 * 2 * 6 + 96 * 5) + 5 * 2


def test_a_sequence_of_any_length():
    inputs = keras.Input((None, 8))
    x = layers.TimeDistributed(layers.Dense(6, activation="relu"))(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalMaxPooling1D()(x)))
    assert CostModel(analyze(model)).macs_dense == 128 * 8 * 6 + 6 * 2


def test_a_wrapper_stands_for_its_layer_in_exclude():
    model = video()
    assert [group.name for group in analyze(model).groups] == ["conv", "dense"]
    for entry in ("conv", model.get_layer("conv")):
        assert [group.name for group in analyze(model, exclude=[entry]).groups] == ["dense"]


def test_layers_that_read_channels_inside_and_models_are_frozen():
    inside = keras.Sequential([keras.Input((4, 4, 6)), layers.Conv2D(3, 1)])
    for layer, reason in (
        (layers.LayerNormalization(), reasons.UNKNOWN_OPERATION),
        (inside, reasons.WRAPPED_UNKNOWN),
    ):
        found = {f.layer: f.reason for f in analyze(video(layer)).frozen}
        assert found["conv"] == reason


def test_gates_by_hand_may_stand_before_wrapped_contractions_only():
    def model(wrapped):
        inputs = keras.Input((4, 3))
        x = NeuronGate(name="gate")(layers.Dense(6, name="first")(inputs))
        x = layers.TimeDistributed(wrapped)(x)
        return keras.Model(inputs, layers.Dense(2)(x))

    assert GatedNetwork(model(layers.Dense(4))).channels.num_neurons == 6
    with pytest.raises(UnsupportedModelError, match="'gate' stands in front"):
        GatedNetwork(model(layers.BatchNormalization()))
