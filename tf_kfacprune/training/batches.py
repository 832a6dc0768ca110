"""Parts of a batch."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

__all__ = ["example_weights", "head_of_batch", "num_examples"]


def num_examples(x: Any) -> Any:
    """Number of examples in a batch of inputs, a scalar int32 tensor."""
    return tf.shape(keras.tree.flatten(x)[0])[0]


def example_weights(sample_weight: Any) -> Any:
    """One weight per example, shape `(batch,)`, float32: means over time steps or pixels.

    Args:
        sample_weight: As a training step gets it. None, and weights of several outputs, are none.

    Returns:
        The weights, or None.
    """
    if sample_weight is None or keras.tree.is_nested(sample_weight):
        return None
    weights = tf.cast(sample_weight, "float32")
    return tf.reduce_mean(tf.reshape(weights, (tf.shape(weights)[0], -1)), axis=1)


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
