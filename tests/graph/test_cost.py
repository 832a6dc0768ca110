from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph import CostModel, analyze


def lenet300():
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(300, name="fc1"),
            layers.Dense(100, name="fc2"),
            layers.Dense(10, name="fc3"),
        ]
    )


def lenet5():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(20, 5, name="c1"),
            layers.MaxPooling2D(),
            layers.Conv2D(50, 5, name="c2"),
            layers.BatchNormalization(name="bn"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(500, name="f1"),
            layers.Dense(10, name="f2"),
        ]
    )


def test_dense_costs_equal_the_count_by_hand():
    cost = CostModel(analyze(lenet5()))
    assert cost.macs_dense == 24 * 24 * 25 * 20 + 8 * 8 * 25 * 20 * 50 + 800 * 500 + 5000
    assert cost.params_dense == lenet5().count_params() == 431080 + 4 * 50


def test_costs_of_a_pruned_chain_are_products_of_what_is_left():
    channels = analyze(lenet300(), prune_inputs=True)
    cost = CostModel(channels)
    openness = np.zeros(channels.num_neurons)
    for group, left in zip(channels.groups, (222, 71, 47), strict=True):
        openness[group.start : group.start + left] = 1
    assert cost.count("macs", openness) == 222 * 71 + 71 * 47 + 47 * 10
    assert cost.count("params", openness) == 222 * 71 + 71 + 71 * 47 + 47 + 47 * 10 + 10
    assert float(cost.fraction("macs", openness.astype("float32"))) == pytest.approx(
        cost.count("macs", openness) / 266200, rel=1e-6
    )
    assert cost.layer_costs(openness)["fc2"] == {"macs": 71 * 47, "params": 71 * 47 + 47}


@pytest.mark.parametrize("measure", ["macs", "params"])
def test_fraction_is_one_when_all_is_open_and_least_when_one_neuron_per_group_is(measure):
    channels = analyze(lenet5())
    cost = CostModel(channels)
    everything = np.ones(channels.num_neurons, "float32")
    assert float(cost.fraction(measure, everything)) == pytest.approx(1, abs=1e-6)
    least = {"macs": 24 * 24 * 25 + 8 * 8 * 25 + 16 + 10, "params": 26 + 26 + 4 + 17 + 20}
    assert cost.least(measure) == pytest.approx(least[measure] / cost.dense(measure))


@pytest.mark.parametrize("measure", ["macs", "params"])
def test_gradient_of_the_fraction_is_what_a_neuron_saves(measure):
    channels = analyze(lenet5())
    cost = CostModel(channels)
    rng = np.random.default_rng(0)
    openness = rng.uniform(size=channels.num_neurons)
    x = tf.constant(openness, "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        fraction = cost.fraction(measure, x)
    gradient = tape.gradient(fraction, x).numpy()

    def exact(openness):
        return cost.exact(measure, openness) / cost.dense(measure)

    for neuron in (0, 19, 20, 69, 70, 300):  # every product is linear in each neuron
        closed, opened = openness.copy(), openness.copy()
        closed[neuron], opened[neuron] = 0, 1
        assert gradient[neuron] == pytest.approx(exact(opened) - exact(closed), rel=1e-4)


def test_shared_layers_cost_macs_per_call_and_parameters_once():
    inputs = keras.Input((6,))
    shared = layers.Dense(6, name="shared")
    model = keras.Model(inputs, layers.Dense(2)(shared(shared(layers.Dense(6)(inputs)))))
    cost = CostModel(analyze(model))
    assert cost.macs_dense == 36 + 2 * 36 + 12
    assert cost.params_dense == model.count_params()


def test_dense_on_sequences_counts_every_position():
    model = keras.Sequential([keras.Input((7, 5)), layers.Dense(4), layers.Dense(3)])
    assert CostModel(analyze(model)).macs_dense == 7 * (20 + 12)


def test_transposed_and_separable_convolutions():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.Conv2DTranspose(5, 3, strides=2, padding="same"),
            layers.SeparableConv2D(6, 3, padding="same", depth_multiplier=2),
            layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2),
        ]
    )
    cost = CostModel(analyze(model))
    assert cost.macs_dense == 16 * 9 * 15 + 64 * (9 * 10 + 10 * 6) + 64 * 9 * 12
    assert cost.params_dense == model.count_params()


def test_fraction_runs_inside_a_compiled_step():
    channels = analyze(lenet5())
    cost = CostModel(channels)
    openness = np.full(channels.num_neurons, 0.5, "float32")
    compiled = tf.function(lambda o: cost.fraction("macs", o), jit_compile=True)
    assert float(compiled(openness)) == pytest.approx(float(cost.fraction("macs", openness)))


def test_unknown_measure_is_refused():
    with pytest.raises(InvalidArgumentError, match="'flops'"):
        CostModel(analyze(lenet300())).fraction("flops", np.ones(400))
