"""Arrays in batches: what comes, in which order, and what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.data import batches
from tf_kfacprune.errors import InvalidArgumentError

X = np.arange(20, dtype="float64").reshape(10, 2)
Y = np.arange(10)


def epoch(dataset):
    return [(x.numpy(), y.numpy()) for x, y in dataset]


def test_without_shuffling_examples_come_in_order_and_the_last_batch_is_smaller():
    got = epoch(batches(X, Y, 4, shuffle=False))
    assert [len(y) for _, y in got] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in got]), X)
    np.testing.assert_array_equal(np.concatenate([y for _, y in got]), Y)


def test_every_epoch_has_all_examples_with_their_labels_in_an_order_of_its_own():
    dataset = batches(X, Y, 3)
    first, second = (epoch(dataset) for _ in range(2))
    orders = [np.concatenate([y for _, y in got]) for got in (first, second)]
    assert not np.array_equal(*orders)
    for got, order in zip((first, second), orders, strict=True):
        np.testing.assert_array_equal(np.sort(order), Y)
        np.testing.assert_array_equal(np.concatenate([x for x, _ in got]), X[order])


def test_the_order_follows_the_seed():
    orders = []
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(seed)
        orders.append(np.concatenate([y for _, y in epoch(batches(X, Y, 3))]))
    np.testing.assert_array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_floats_get_the_width_of_keras_and_integers_keep_theirs():
    x, y = next(iter(batches(X, Y.astype("uint8"), 3)))
    assert (x.dtype, y.dtype) == ("float32", "uint8")


def test_the_length_is_known_and_nothing_is_tuned():
    dataset = batches(X, Y, 4)
    assert int(dataset.cardinality()) == 3
    assert dataset.options().autotune.enabled is False


def test_bad_input_is_named():
    with pytest.raises(
        InvalidArgumentError, match="`batch_size` of batches must be an integer >= 1"
    ):
        batches(X, Y, 0)
    with pytest.raises(InvalidArgumentError, match="received 10 and 9"):
        batches(X, Y[:9], 4)
