"""`Masking`: what is masked is decided by the channels that stay."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune.compaction import compact, parity_error
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import analyze, reasons


def masked_states(reader, value=0.0):
    """Masks steps of which all channels have one value, as ReLUs often have."""
    inputs = keras.Input((None, 3), name="x")
    x = layers.Dense(5, activation="relu", name="states")(inputs)
    x = reader(layers.Masking(value, name="masking")(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def masked_inputs(reader):
    inputs = keras.Input((7, 3), name="x")
    x = reader(layers.Masking(name="masking")(inputs))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


READERS = {
    "lstm": lambda x: layers.LSTM(4, name="lstm")(x),
    "two": lambda x: layers.GRU(3)(layers.SimpleRNN(4, return_sequences=True, name="lstm")(x)),
    "mean": lambda x: layers.GlobalAveragePooling1D()(layers.Dense(4, name="lstm")(x)),
    "attention": lambda x: layers.GlobalAveragePooling1D()(
        layers.MultiHeadAttention(2, 3, name="lstm")(x, x)
    ),
}


def some_steps_masked():
    data = np.random.default_rng(0).normal(size=(6, 7, 3)).astype("float32")
    data[:, 4:] = 0.0
    data[0, 1:] = 0.0
    return data


@pytest.mark.parametrize("reader", READERS)
def test_compact_equals_gated(reader, assert_exact):
    model = masked_states(READERS[reader])
    assert "states" in {group.name for group in analyze(model).groups}
    assert_exact(model, data=some_steps_masked())


def test_a_channel_that_goes_no_longer_keeps_a_step_from_being_masked():
    model = masked_states(READERS["lstm"])
    states = model.get_layer("states")
    states.kernel.assign(np.eye(3, 5))
    states.bias.assign([-1.0, -1.0, -1.0, -1.0, 1.0])  # the last is never zero
    gated = insert_gates(model)
    (bank,) = GatedNetwork(gated).sources
    group = next(g for g in GatedNetwork(gated).channels.groups if g.name == "states")
    values = np.ones(bank.size, "float32")
    values[group.start + 4] = 0.0
    bank.set_values(values)
    small, data = compact(gated), some_steps_masked()
    assert parity_error(gated(data), small(data)) <= 1e-6
    first = data[:, :4]  # all behind is zero before the ReLU
    assert parity_error(small(data), small(first)) <= 1e-6
    assert parity_error(model(data), model(first)) > 1e-3


@pytest.mark.parametrize("reader", READERS)
def test_masks_are_those_of_all_inputs_if_inputs_are_pruned(reader, assert_exact):
    gated = assert_exact(
        masked_inputs(READERS[reader]), data=some_steps_masked(), prune_inputs=True
    )
    groups = {group.name: group for group in GatedNetwork(gated).channels.groups}
    (bank,) = GatedNetwork(gated).sources
    values = np.ones(bank.size, "float32")
    values[groups["x"].start] = 0.0
    bank.set_values(values)
    small, data = compact(gated), some_steps_masked()
    only_first = data.copy()
    only_first[:, 4, 0] = 1.0  # what is cut off still says that there is a step
    for x in (data, only_first):
        assert parity_error(gated(x), small(x)) <= 1e-6
    assert parity_error(small(data), small(only_first)) > 1e-4


def test_values_that_cannot_be_compared_freeze():
    for value in (float("nan"), np.zeros(5, "float32")):
        channels = analyze(masked_states(READERS["lstm"], value))
        assert {f.reason for f in channels.frozen if f.layer == "states"} == {reasons.REDUCED}
