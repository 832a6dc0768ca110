"""Parts of a batch."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

__all__ = ["head_of_batch", "num_examples"]


def num_examples(x: Any) -> Any:
    """Number of examples in a batch of inputs, a scalar int32 tensor."""
    return tf.shape(keras.tree.flatten(x)[0])[0]


def head_of_batch(data: Any, fraction: float) -> Any:
    """The first `ceil(fraction * batch)` examples of every tensor in a structure.

    Args:
        data: Structure of tensors with a common batch axis; None stays None.
        fraction: Share of the batch, in (0, 1].
    """
    if fraction == 1.0:
        return data

    def head(tensor: Any) -> Any:
        if tensor is None:
            return None
        batch = tf.cast(tf.shape(tensor)[0], "float32")
        return tensor[: tf.cast(tf.math.ceil(fraction * batch), "int32")]

    return keras.tree.map_structure(head, data)
