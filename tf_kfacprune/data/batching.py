"""Batches of arrays as a `tf.data.Dataset` that does not stall between epochs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["batches"]


def batches(x: Any, y: Any, batch_size: int, *, shuffle: bool = True) -> tf.data.Dataset:
    """Examples in batches, for `fit(kp.data.batches(x, y, 256), epochs=40)`.

    The same as `fit(x, y, batch_size=256, epochs=40)`, but tf.data does not tune itself. TensorFlow
    2.21 tunes the data set that Keras makes of arrays from a thread which sleeps for longer and
    longer, and does not wake it when an epoch ends: with all the data in memory there is nothing
    to win, and every epoch ends with a wait of up to its own length.

    Args:
        x: Inputs, shape `(examples, ...)`, or a structure of such arrays.
        y: Labels, the same number of examples.
        batch_size: Examples per batch; the last batch of an epoch may be smaller.
        shuffle: Whether the order is drawn anew in every epoch, from the seed of
            `keras.utils.set_random_seed`.

    Raises:
        InvalidArgumentError: If `batch_size` is not positive, or the arrays differ in length.
    """
    if batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be at least 1, received {batch_size!r}.")
    lengths = {len(array) for array in tf.nest.flatten((x, y))}
    if len(lengths) != 1:
        raise InvalidArgumentError(
            f"All arrays must hold the same number of examples, received {sorted(lengths)}."
        )
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    if shuffle:
        dataset = dataset.shuffle(lengths.pop())
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.batch(batch_size).prefetch(2).with_options(options)
