"""A strategy of a single device, as on a machine with one: the steps are those without it."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int64")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def pruned(scope, *callbacks):
    """Weights of a network that was pruned within the scope."""
    keras.utils.set_random_seed(0)
    with scope:
        net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)])
        model = kp.PrunableModel(net, kp.Budget(macs=0.5), policy="magnitude", seed=0)
        model.compile(keras.optimizers.SGD(0.1), LOSS)
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=list(callbacks))
    assert model.has_settled
    return net.get_weights()


def test_one_replica_takes_the_steps_of_no_strategy(tmp_path):
    pytest.importorskip("tensorboard")
    expected = pruned(contextlib.nullcontext())
    log = kp.callbacks.PruningLog(tmp_path, update_freq=2)
    found = pruned(tf.distribute.MirroredStrategy(["cpu:0"]).scope(), log)
    for weights, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(weights, wanted)
