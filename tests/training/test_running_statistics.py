"""Tests of what BatchNormalization remembers of the network before pruning."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.training import shrinking
from tf_kfacprune.training.running_statistics import forgetting_momentum


def network(momentum, trainable=True):
    """Dense layers with BatchNormalization between them."""
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, name="fc")(inputs)
    x = keras.layers.BatchNormalization(momentum=momentum, trainable=trainable, name="bn")(x)
    x = keras.layers.Dense(16, activation="relu", name="fc2")(x)
    x = keras.layers.BatchNormalization(momentum=momentum, name="bn2")(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def pruned(net, **options):
    """A model pruned on random data, and the data."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(1.0, 2.0, (640, 12)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    pm = kp.PrunableModel(
        net, budget=kp.Budget(macs=0.4), policy="magnitude", phases=kp.Phases(0.1, 0.3), **options
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pm.compile(keras.optimizers.Adam(1e-3), loss=loss)
    pm.fit(x, y, batch_size=16, epochs=5, verbose=0)
    return pm, x


@pytest.mark.parametrize("shrink", [False, True], ids=["at full size", "through a compact copy"])
def test_moving_statistics_are_those_of_the_pruned_network(shrink, monkeypatch):
    monkeypatch.setattr(shrinking, "_LEAST_STEPS", 1)
    monkeypatch.setattr(shrinking, "_LARGEST_FRACTION", 1.0)
    net = network(momentum=0.9999)
    pm, x = pruned(net, shrink=shrink)
    assert pm.was_shrunk == shrink
    small = kp.compact(pm)
    layer = small.get_layer("bn2")
    before = keras.Model(small.inputs, layer.input).predict(x, verbose=0)
    spread = before.std(axis=0)
    np.testing.assert_allclose(layer.moving_mean, before.mean(axis=0), atol=0.3 * spread.max())
    np.testing.assert_allclose(layer.moving_variance, before.var(axis=0), rtol=0.3)


def test_networks_in_float64_have_statistics_in_float64():
    keras.config.set_dtype_policy("float64")
    try:
        net = network(momentum=0.9)
        pm, _ = pruned(net, shrink=False)
    finally:
        keras.config.set_dtype_policy("float32")
    statistics = pm.net.get_layer("bn").moving_mean
    assert statistics.dtype == "float64"
    assert np.any(np.array(statistics) != 0)


def test_frozen_statistics_stay():
    net = network(momentum=0.9, trainable=False)
    pm, _ = pruned(net, shrink=False)
    layer = pm.net.get_layer("bn")
    np.testing.assert_array_equal(layer.moving_variance, np.ones(16))


def test_momentum_is_the_layers_own_again_after_the_block():
    net = network(momentum=0.97)
    layer = net.get_layer("bn")
    with forgetting_momentum(net, tf.constant(0)):
        assert float(layer.momentum) == pytest.approx(0.1)
    assert layer.momentum == 0.97
    with pytest.raises(RuntimeError), forgetting_momentum(net, tf.constant(0)):
        raise RuntimeError
    assert layer.momentum == 0.97


def test_blocks_of_replicas_may_overlap():
    net = network(momentum=0.97)
    first, second = (forgetting_momentum(net, tf.constant(0)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert net.get_layer("bn").momentum == 0.97


def test_the_cap_rises_to_the_layers_own_momentum():
    net = network(momentum=0.97)
    for steps, expected in ((1, 2 / 11), (90, 0.91), (10_000, 0.97)):
        with forgetting_momentum(net, tf.constant(steps)):
            assert float(net.get_layer("bn").momentum) == pytest.approx(expected)
