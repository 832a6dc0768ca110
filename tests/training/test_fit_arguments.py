"""Arrays given to `fit` train as Keras' own batches would."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.training.fit_arguments import batched

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6))
Y = RNG.integers(0, 3, 50)


def fitted(**arguments):
    """History and weights of a small network."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model = kp.KFACModel(net, seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kp.KFAC(1e-2), loss=loss)
    history = model.fit(X, Y, epochs=2, verbose=0, **arguments).history
    return history, net.get_weights()


@pytest.mark.parametrize("batch_size", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_in_the_same_order_training_is_that_of_keras(batch_size):
    options = {"batch_size": batch_size, "shuffle": False, "validation_data": (X[:20], Y[:20])}
    ours = fitted(**options)
    plain = fitted(**options, class_weight=None)  # what is not understood is left to Keras
    assert ours[0] == plain[0]
    for a, b in zip(ours[1], plain[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_examples_are_shuffled_by_default():
    losses = [fitted(batch_size=16, shuffle=s)[0]["loss"] for s in (True, False)]
    assert losses[0] != losses[1]


def test_arrays_become_data_sets():
    got = batched({"x": X, "y": Y, "epochs": 3, "validation_data": (X, Y), "batch_size": 16})
    assert got.keys() == {"x", "epochs", "validation_data", "shuffle"}
    assert got["shuffle"] is False  # Keras would warn that it cannot shuffle a data set
    assert int(got["x"].cardinality()) == int(got["validation_data"].cardinality()) == 4
    got = batched({"x": X, "y": Y, "validation_data": (X, Y), "validation_batch_size": 25})
    assert [int(got[name].cardinality()) for name in ("x", "validation_data")] == [2, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": tf.data.Dataset.from_tensors((X, Y))},
        {"x": [X, X], "y": Y},
        {"x": X, "y": Y[:9]},
        {"x": X, "y": None},
        {"x": X, "y": Y, "sample_weight": np.ones(50)},
        {"x": X, "y": Y, "validation_split": 0.1},
        {"x": X, "y": Y, "shuffle": "batch"},
        {"x": X, "y": Y, "validation_data": (X, Y, np.ones(50))},
    ],
    ids=["dataset", "list", "lengths", "no_labels", "weights", "split", "blocks", "val_weights"],
)
def test_everything_else_is_left_to_keras(arguments):
    assert batched(arguments) is arguments
