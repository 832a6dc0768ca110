"""Batches whose order follows from the seed and the number of the epoch, and from nothing else."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

__all__ = ["EpochBatches"]


class EpochBatches(keras.callbacks.Callback):
    """A data set to `fit` with this callback, so that a run can go on in the middle of an epoch.

    `tf.data.Dataset.shuffle` draws the order of an epoch from how many epochs it has given out:
    a run that is resumed would repeat the orders of the first ones.

    Args:
        x: Inputs, shape `(examples, ...)`.
        y: Labels, shape `(examples, ...)`.
        batch_size: Examples per batch; the last one of an epoch may be smaller.
        seed: Seed of the order, from 0 up.

    Attributes:
        dataset: Pairs `(inputs, labels)`, for `fit(batches.dataset, shuffle=False)`. Like
            `kp.data.batches` it is not tuned by tf.data, so that epochs do not end with a wait.
        steps: Batches of an epoch.
        start: Batches to leave out of the next epoch, because they have been trained on.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._examples = len(x)
        self.steps = -(-len(x) // batch_size)
        self.start = 0
        with tf.device("cpu:0"):  # they may not fit on an accelerator
            inputs, labels = (tf.convert_to_tensor(array) for array in (x, y))
            self._order = tf.Variable(tf.zeros(len(x), tf.int64), trainable=False)
            self._offset = tf.Variable(0, trainable=False, dtype=tf.int64)

        def batch(index: Any) -> tuple[Any, Any]:
            begin = (index + self._offset) * batch_size
            rows = self._order[begin : begin + batch_size]
            return tf.gather(inputs, rows), tf.gather(labels, rows)

        options = tf.data.Options()
        options.autotune.enabled = False
        dataset = tf.data.Dataset.range(self.steps).map(batch)
        self.dataset = dataset.prefetch(1).with_options(options)
        self._ends_early = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        order = np.random.default_rng([self._seed, epoch]).permutation(self._examples)
        self._order.assign(order)
        self._offset.assign(self.start)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # `batch` counts from 0 in an epoch that was begun before, too.
        if self.start and batch + 1 == self.steps - self.start:
            self.model.stop_training = self._ends_early = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.start = 0
        if self._ends_early:  # the epoch was to end, not the run
            self.model.stop_training = self._ends_early = False
