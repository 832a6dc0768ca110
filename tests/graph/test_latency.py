"""Latency as a cost: sums of products of curves, and tables that do not fit."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_kfacprune import PrunableModel, compact
from tf_kfacprune.errors import BudgetError, InvalidArgumentError
from tf_kfacprune.graph import CostModel, LatencyTable, analyze, layer_signature
from tf_kfacprune.graph.curves import Curve
from tf_kfacprune.graph.latency import LayerTimes
from tf_kfacprune.pruning import Budget

TILES_OF_FOUR = Curve((4, 5, 8, 9, 12, 13, 16), (1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0))
ROWS = {
    "conv": LayerTimes(5.0, Curve((1, 2), (10.0, 12.0)), TILES_OF_FOUR, one_to_one=30.0),
    "depthwise": LayerTimes(outputs=Curve((1, 16), (3.0, 18.0))),
    "pool": LayerTimes(outputs=Curve((2, 16), (1.0, 8.0))),
    "logits": LayerTimes(1.0, Curve((9, 144), (9.0, 144.0)), Curve((4,), (0.5,))),
}


def network(channels=2):
    inputs = keras.Input((8, 8, channels), name="image")
    x = layers.Conv2D(16, 3, name="conv")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Flatten(name="flatten")(layers.MaxPooling2D(name="pool")(x))
    return keras.Model(inputs, layers.Dense(4, name="logits")(x))


def table_of(model, **kwargs):
    calls = [call for call in analyze(model).graph.calls if call.path in ROWS]
    rows = {layer_signature(call): ROWS[call.path] for call in calls}
    return LatencyTable("a processor", rows, **kwargs)


def open_filters(cost, count):
    openness = np.zeros(cost.channels.num_neurons)
    openness[:count] = 1.0
    return openness


@pytest.mark.parametrize(("filters", "tiles"), [(16, 4), (13, 4), (12, 3), (6, 2), (1, 1)])
def test_the_latency_is_the_sum_over_layers_of_products_of_curves(filters, tiles):
    table = table_of(network(), scale=1.5, overhead=3.0)
    cost = CostModel(analyze(network()), latency_table=table)
    openness = open_filters(cost, filters)
    conv, depthwise, pool = 5 + 12 * tiles, 2 + filters, 0.5 * max(filters, 2)
    logits = 1 + 0.5 * 9 * filters
    expected = 3.0 + 1.5 * (conv + depthwise + pool + logits)
    assert cost.exact("latency", openness) == pytest.approx(expected, rel=1e-14)
    fraction = cost.fraction("latency", openness)  # in float64, as landing has it
    share = expected / cost.dense("latency")
    np.testing.assert_allclose(fraction.numpy(), share, rtol=1e-14)
    in_float32 = cost.fraction("latency", openness.astype("float32"))
    np.testing.assert_allclose(in_float32.numpy(), share, rtol=1e-6)


def test_features_take_time_to_be_picked():
    table = table_of(network(), scale=1.5)
    open_cost, cost = (
        CostModel(analyze(network(), prune_features=is_pruned), latency_table=table)
        for is_pruned in (False, True)
    )
    (features,) = cost.channels.picked
    assert len(features.labels) == 9 * 16
    alone = np.ones(open_cost.channels.num_neurons)
    together = np.ones(cost.channels.num_neurons)
    picked = cost.exact("latency", together) - open_cost.exact("latency", alone)
    assert picked == pytest.approx(1.5 * 0.006 * 9 * 16)
    together[cost.channels.neurons(features.labels)[16:]] = 0.0  # one position of nine stays
    rest = 1.5 * (5 + 12 * 4 + 2 + 16 + 8) + 1.5 * 0.006 * 16
    assert cost.exact("latency", together) == pytest.approx(rest + 1.5 * (1 + 0.5 * 16))


def test_a_filter_saves_its_share_of_what_half_of_its_layer_saves():
    cost = CostModel(analyze(network()), latency_table=table_of(network()))
    openness = tf.Variable(open_filters(cost, 14))
    with tf.GradientTape() as tape:
        value = cost.cost("latency", openness)
    saved = tape.gradient(value, openness).numpy()
    half = cost.exact("latency", open_filters(cost, 7))
    np.testing.assert_allclose(saved, (cost.exact("latency", openness.numpy()) - half) / 7)
    # Where a curve is straight, this is what closing one filter saves to the last digit.
    straight = cost.exact("latency", open_filters(cost, 14)) - cost.exact(
        "latency", open_filters(cost, 13)
    )
    np.testing.assert_allclose(saved, straight + 12 * (4 - 2) / 7)


def test_one_channel_that_becomes_one_takes_longer_and_two_are_kept():
    table = table_of(network(1))
    cost = CostModel(analyze(network(1)), latency_table=table)
    one, two = (cost.exact("latency", open_filters(cost, n)) for n in (1, 2))
    assert one == pytest.approx(two + 30 - 1 - 4.5)  # one channel fewer behind the convolution
    dense = cost.dense("latency")
    with pytest.raises(BudgetError, match=rf"latency={two - 1.0:.4g}.* or two where one would"):
        PrunableModel(network(1), Budget(latency=two - 1.0), latency_table=table)
    pm = PrunableModel(network(1), Budget(latency=(two + 0.1) / dense), latency_table=table)
    pm.controller.land()
    assert compact(pm).get_layer("conv").filters == 2


@pytest.mark.parametrize("share", [0.4, 0.55, 0.7, 0.9])
def test_landing_obeys_the_prediction_and_fills_what_costs_nothing(share):
    table = table_of(network(), overhead=3.0)
    cost = CostModel(analyze(network()), latency_table=table)
    pm = PrunableModel(network(), Budget(latency=share), latency_table=table)
    pm.controller.land()
    filters = compact(pm).get_layer("conv").filters
    allowed = share * cost.dense("latency")
    times = [cost.exact("latency", open_filters(cost, n)) for n in range(1, 17)]
    assert filters == max(n for n, time in enumerate(times, start=1) if time <= allowed)
    outcome = pm.budget_outcomes()["latency"]
    assert outcome.achieved * cost.dense("latency") == pytest.approx(times[filters - 1])


def test_layers_that_the_table_does_not_know_are_named():
    other = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="other")])
    with pytest.raises(InvalidArgumentError, match=r"does not know layer 'other'.*another model"):
        CostModel(analyze(other), latency_table=table_of(network()))


@pytest.mark.parametrize(
    "row",
    [
        {"constant": -1.0},
        {"one_to_one": -1.0},
        {"inputs": Curve((1, 2), (-1.0, 1.0))},
        {"constant": -3.0, "inputs": Curve((1,), (1.0,)), "outputs": Curve((1,), (2.0,))},
    ],
)
def test_times_must_not_be_negative(row):
    with pytest.raises(InvalidArgumentError, match="must not be negative"):
        LayerTimes(**row)


def test_a_table_is_of_a_file_that_there_is_and_takes_no_negative_time():
    with pytest.raises(InvalidArgumentError, match=r"`of` must be one of .*Received: of='int4'"):
        LatencyTable("a processor", {}, of="int4")
    with pytest.raises(InvalidArgumentError, match="overhead=-1"):
        LatencyTable("a processor", {}, overhead=-1.0)


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
    table = table_of(model, of="int8", scale=0.9, overhead=1.0)
    dense = CostModel(analyze(model), latency_table=table).dense("latency")
    pm = PrunableModel(model, Budget(latency=0.6 * dense), latency_table=table)
    pm.controller.land()
    pm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.latency_table == table
    outcome = loaded.budget_outcomes()["latency"]
    assert outcome.asked == pytest.approx(0.6 * dense)
    assert 0.7 * outcome.asked <= outcome.achieved <= outcome.asked
