"""Weights of opened layers in the compact model, which has no class of this package in it.

A weight that belongs to no ordinary layer becomes the table of an `Embedding`, all rows of which
are looked up in order. The row numbers are `zero + arange(rows)`, with a zero from the model's
input, because a Keras graph computes nothing that does not depend on an input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.graph import Weight

__all__ = ["holder", "look_up", "table_shape"]


def table_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the table that holds a weight of the given shape."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape[1:] if len(shape) > 1 else shape)


def holder(layer: Weight, shape: Sequence[int], name: str) -> keras.layers.Embedding:
    """An ordinary layer for what is left of a weight.

    Args:
        layer: The layer that owns the whole weight.
        shape: The shape of what is left.
        name: Name of the ordinary layer.

    Returns:
        An embedding whose table has one entry per entry of the weight.
    """
    rows, columns = table_shape(shape)
    dtype = layer.dtype_policy if layer.weight_autocast else layer.weight_dtype
    return keras.layers.Embedding(
        rows,
        columns,
        embeddings_regularizer=layer.regularizer,
        embeddings_constraint=layer.constraint,
        trainable=layer.trainable,
        name=name,
        dtype=dtype,
    )


def look_up(table: keras.layers.Embedding, shape: Sequence[int], place: Any) -> Any:
    """The weight as a symbolic tensor.

    Args:
        table: What `holder` made.
        shape: The shape of the weight.
        place: An input of the model.

    Returns:
        A symbolic tensor of the given shape.
    """
    zero = ops.zeros_like(place[(0,) * len(place.shape)], dtype="int32")
    rows = table(zero + np.arange(table_shape(shape)[0], dtype="int32"))
    return rows if tuple(rows.shape) == tuple(shape) else ops.reshape(rows, tuple(shape))
