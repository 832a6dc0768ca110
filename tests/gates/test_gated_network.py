from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import GatedDense, GatedNetwork, NeuronGate, insert_gates
from tf_kfacprune.graph import CostModel, analyze, keep_opaque, reasons


def test_inserted_gates_map_one_to_one_to_neurons():
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(6),
         layers.Dense(2)]
    )  # fmt: skip
    network = GatedNetwork(insert_gates(model))
    assert network.num_gates == network.channels.num_neurons == 10
    np.testing.assert_array_equal(network.neuron_gates[:, 0], np.arange(10))
    dense = CostModel(analyze(model))
    assert (network.cost.macs_dense, network.cost.params_dense) == (
        dense.macs_dense,
        model.count_params(),
    )


def two_readers():
    inputs = keras.Input((5,))
    x = layers.Dense(4, activation="relu", name="body")(inputs)
    a, b = GatedDense(3, name="a")(x), GatedDense(2, name="b")(x)
    return keras.Model(inputs, [a, b])


def test_a_neuron_with_two_gates_is_as_open_as_the_more_open_one():
    network = GatedNetwork(two_readers())
    assert network.num_gates == 8
    assert np.sort(network.neuron_gates, axis=1).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    gates = tf.constant([0.0, 0, 1, 0.2, 0, 0.5, 0, 0.1])
    with tf.GradientTape() as tape:
        tape.watch(gates)
        openness = network.openness(gates)
        total = ops.sum(openness)
    np.testing.assert_allclose(openness, [0, 0.5, 1, 0.2])
    gradient = tf.convert_to_tensor(tape.gradient(total, gates))
    np.testing.assert_allclose(gradient, [0.5, 0, 1, 1, 0.5, 1, 0, 0])


def test_a_gate_behind_flatten_controls_a_channel_only_together_with_its_siblings():
    inputs = keras.Input((4, 4, 1))
    x = layers.Flatten()(layers.Conv2D(3, 3)(inputs))
    network = GatedNetwork(keras.Model(inputs, GatedDense(2)(x)))
    assert network.neuron_gates.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_neurons_with_an_ungated_reader_are_not_prunable():
    inputs = keras.Input((5,))
    x = layers.Dense(4, name="body")(inputs)
    y = layers.Dense(6, name="other")(x)
    net = keras.Model(inputs, [GatedDense(3)(x), GatedDense(3)(y)])
    channels = GatedNetwork(net).channels
    assert [group.name for group in channels.groups] == ["other"]
    frozen = {f.layer: f.reason for f in channels.frozen}
    assert frozen["body"] == reasons.NOT_GATED


@pytest.mark.parametrize(
    "middle",
    [
        layers.BatchNormalization(name="wrong"),
        layers.Activation("sigmoid", name="wrong"),
        layers.ReLU(6, name="wrong"),
        layers.LayerNormalization(name="wrong"),
        layers.Softmax(name="wrong"),
        layers.Rescaling(1.0, 3.0, name="wrong"),
        keep_opaque(layers.Lambda(lambda x: x, name="wrong")),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_gates_in_the_wrong_place_are_refused_by_name(middle):
    inputs = keras.Input((5,))
    x = NeuronGate(name="early")(layers.Dense(4)(inputs))
    net = keras.Model(inputs, layers.Dense(2)(middle(x)))
    with pytest.raises(
        UnsupportedModelError, match=r"'early' stands in front of 'wrong'.*input of"
    ):
        GatedNetwork(net)


def test_adding_differently_gated_tensors_is_refused():
    inputs = keras.Input((5,))
    a, b = (NeuronGate()(layers.Dense(4)(inputs)) for _ in range(2))
    net = keras.Model(inputs, layers.Dense(2)(layers.Add(name="sum")([a, b])))
    with pytest.raises(UnsupportedModelError, match="'sum'"):
        GatedNetwork(net)


def test_two_gates_on_one_edge_are_refused():
    inputs = keras.Input((5,))
    x = NeuronGate()(NeuronGate()(layers.Dense(4)(inputs)))
    with pytest.raises(UnsupportedModelError, match="two gates"):
        GatedNetwork(keras.Model(inputs, layers.Dense(2)(x)))


@pytest.mark.parametrize(
    "middle",
    [layers.ReLU(), layers.LeakyReLU(), layers.Activation("relu"), layers.Dropout(0.3),
     layers.MaxPooling2D(), layers.AveragePooling2D(2), layers.ZeroPadding2D(), layers.Cropping2D(),
     layers.UpSampling2D(), layers.GlobalAveragePooling2D(keepdims=True)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_gates_may_stand_before_homogeneous_layers(middle):
    inputs = keras.Input((8, 8, 1))
    x = NeuronGate()(layers.Conv2D(4, 3)(inputs))
    network = GatedNetwork(keras.Model(inputs, layers.Conv2D(2, 1)(middle(x))))
    assert network.channels.num_neurons == 4


def test_a_model_without_gates_is_refused():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4), layers.Dense(2)])
    with pytest.raises(UnsupportedModelError, match="has no gates"):
        GatedNetwork(model)


def test_gates_that_can_remove_nothing_are_refused_with_the_reason():
    inputs = keras.Input((5,))
    x = layers.LayerNormalization()(layers.Dense(4, name="body")(inputs))
    with pytest.raises(UnsupportedModelError, match="'body'"):
        GatedNetwork(keras.Model(inputs, GatedDense(2)(x)))


def test_where_all_gates_of_a_group_are_closed_one_neuron_stays():
    network = GatedNetwork(two_readers())
    for source in network.sources:
        source.set_values(np.zeros(4))
    assert network.kept_neurons().sum() == 1
