"""Latency as a cost: sums over layers, and tables that do not fit."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune import PrunableModel
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph import CostModel, LatencyTable, analyze, layer_signature
from tf_kfacprune.pruning import Budget


def network():
    inputs = keras.Input((8, 8, 2), name="image")
    x = layers.Conv2D(6, 3, name="conv")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    x = layers.Flatten(name="flatten")(layers.MaxPooling2D(name="pool")(x))
    return keras.Model(inputs, layers.Dense(4, name="logits")(x))


def table_of(model, **kwargs):
    calls = [call for call in analyze(model).graph.calls if call.path in ("conv", "logits")]
    rows = [(5.0, 0.01, 0.5, 0.25), (1.0, 0.1, 0.0, 2.0)]
    names = [layer_signature(call) for call in calls]
    return LatencyTable("a processor", dict(zip(names, rows, strict=True)), **kwargs)


def test_the_latency_is_the_sum_over_layers_of_what_is_left():
    model = network()
    channels = analyze(model)
    cost = CostModel(channels, latency_table=table_of(model, per_value=0.001, overhead=3.0))
    openness = np.zeros(channels.num_neurons)
    openness[:4] = 1.0  # of 6 filters
    conv = 5.0 + 0.01 * (6 * 6 * 9 * 2 * 4) + 0.5 * 2 + 0.25 * 4
    logits = 1.0 + 0.1 * (9 * 4 * 4) + 2.0 * 4
    pool = 0.001 * 6 * 6 * 4
    assert cost.exact("latency", openness) == pytest.approx(3.0 + conv + logits + pool)
    fraction = cost.fraction("latency", openness.astype("float32"))
    expected = cost.exact("latency", openness) / cost.dense("latency")
    assert float(fraction) == pytest.approx(expected, rel=1e-6)


def test_layers_that_the_table_does_not_know_are_named():
    model = network()
    other = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="other")])
    with pytest.raises(InvalidArgumentError, match=r"does not know layer 'other'.*another model"):
        CostModel(analyze(other), latency_table=table_of(model))


def test_times_must_not_be_negative():
    with pytest.raises(InvalidArgumentError, match="negative"):
        LatencyTable("a processor", {"Dense": (1.0, -0.1, 0.0, 0.0)})


def test_names_and_initializers_do_not_matter_to_a_layer():
    inputs = keras.Input((3,))
    first, second, third = (
        analyze(keras.Model(inputs, layer(inputs))).graph.calls[-1]
        for layer in (
            layers.Dense(2, name="a"),
            layers.Dense(2, kernel_initializer="zeros", name="b"),
            layers.Dense(2, activation="relu", name="c"),
        )
    )
    assert layer_signature(first) == layer_signature(second) != layer_signature(third)


def test_a_model_keeps_its_table_and_its_budget_in_microseconds(tmp_path):
    model = network()
    table = table_of(model)
    dense = CostModel(analyze(model), latency_table=table).dense("latency")
    pm = PrunableModel(model, Budget(latency=0.6 * dense), latency_table=table)
    pm.controller.land()
    pm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.latency_table == table
    outcome = loaded.budget_outcomes()["latency"]
    assert outcome.asked == pytest.approx(0.6 * dense)
    assert 0.7 * outcome.asked <= outcome.achieved <= outcome.asked
