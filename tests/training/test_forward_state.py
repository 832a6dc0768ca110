"""A forward pass in training mode can be undone and repeated, noise and statistics included."""

import keras
import numpy as np

from tf_kfacprune.curvature import ForwardState

to_numpy = keras.ops.convert_to_numpy


def _noisy_network():
    inputs = keras.Input((6,))
    x = keras.layers.Dropout(0.5)(keras.layers.Dense(8)(inputs))
    return keras.Model(inputs, keras.layers.BatchNormalization()(x))


def test_a_pass_is_repeated_with_the_same_noise_and_leaves_no_trace():
    network = _noisy_network()
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    statistics = [to_numpy(v) for v in network.non_trainable_weights]
    state = ForwardState(network)
    first = to_numpy(network(x, training=True))
    other = to_numpy(network(x, training=True))
    state.restore()
    for before, after in zip(statistics, network.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(before, to_numpy(after))
    np.testing.assert_array_equal(first, to_numpy(network(x, training=True)))
    assert not np.array_equal(first, other)


def test_what_a_step_changes_on_purpose_is_left_alone():
    network = _noisy_network()
    statistics = network.non_trainable_weights
    state = ForwardState(network, ignore=statistics[:1])
    for variable in statistics:
        variable.assign(np.full(variable.shape, 7.0))
    state.restore()
    assert to_numpy(statistics[0])[0] == 7.0
    assert to_numpy(statistics[1])[0] == 1.0
