"""Batches of arrays as a `tf.data.Dataset` that does not stall between epochs."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.validation import require_count

__all__ = ["batches"]


def batches(
    x: np.ndarray, y: np.ndarray, batch_size: int, *, shuffle: bool = True
) -> tf.data.Dataset:
    """Examples in batches, for `fit(kp.data.batches(x, y, 256), epochs=40, shuffle=False)`.

    The same as `fit(x, y, batch_size=256, epochs=40)` of Keras, but tf.data does not tune itself.
    TensorFlow 2.21 tunes the data set that Keras makes of arrays from a thread that sleeps for
    longer and longer and is not woken when an epoch ends, so that epochs end with a wait of up to
    their own length. With all the data in memory there is nothing to tune. `fit` of the models of
    this package does this to arrays by itself.

    Args:
        x: Inputs, shape `(examples, ...)`; floats become those of `keras.config.floatx()`.
        y: Labels, shape `(examples, ...)`.
        batch_size: Examples per batch; the last batch of an epoch may be smaller.
        shuffle: Whether the order is drawn anew in every epoch, from the seed of
            `keras.utils.set_random_seed`.

    Returns:
        A data set of pairs `(inputs, labels)` of known length.

    Raises:
        InvalidArgumentError: If `batch_size` is no integer >= 1, or the arrays differ in length.
    """
    require_count("batches", "batch_size", batch_size)
    if len(x) != len(y):
        raise InvalidArgumentError(
            f"x and y must hold the same number of examples, received {len(x)} and {len(y)}."
        )
    with tf.device("cpu:0"):  # they may not fit on an accelerator
        inputs, labels = (tf.convert_to_tensor(array, _dtype(array)) for array in (x, y))
    rows = tf.data.Dataset.range(len(x))
    if shuffle:
        rows = rows.shuffle(len(x))
    dataset = rows.batch(batch_size).map(lambda i: (tf.gather(inputs, i), tf.gather(labels, i)))
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.prefetch(1).with_options(options)


def _dtype(array: np.ndarray) -> str | None:
    return keras.config.floatx() if np.issubdtype(array.dtype, np.floating) else None
