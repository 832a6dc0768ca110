"""Functions of TensorFlow, expressed by operations of Keras while a call is being recorded.

TensorFlow refuses symbolic tensors of Keras. Layers that call these functions, as the attention
within a window of keras_hub does, could not be recorded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph.rules.substitution import substituted

__all__ = ["expressed_by_keras"]


@contextmanager
def expressed_by_keras() -> Iterator[None]:
    """Lets `tf.linalg.band_part` and `tf.gather` take symbolic tensors within a `with` block."""
    band_part = _dispatch(_band_part, tf.linalg.band_part)
    gather = _dispatch(_gather, tf.gather)
    with substituted(tf.linalg, band_part=band_part), substituted(tf, gather=gather):
        yield


def _dispatch(symbolic: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        is_symbolic = any(isinstance(leaf, keras.KerasTensor) for leaf in given)
        return (symbolic if is_symbolic else original)(*args, **kwargs)

    return function


def _band_part(input: Any, num_lower: Any, num_upper: Any, name: str | None = None) -> Any:
    """Keeps a band around the diagonal of matrices; a negative width keeps that side whole."""
    del name
    rows, columns = ops.shape(input)[-2:]
    row, column = (ops.expand_dims(ops.arange(n), k) for n, k in ((rows, 1), (columns, 0)))
    below = ops.subtract(row, column)
    kept = ops.logical_and(
        ops.logical_or(ops.less(num_lower, 0), ops.less_equal(below, num_lower)),
        ops.logical_or(ops.less(num_upper, 0), ops.less_equal(ops.negative(below), num_upper)),
    )
    if keras.backend.standardize_dtype(input.dtype) == "bool":
        return ops.logical_and(input, kept)
    return ops.where(kept, input, ops.zeros_like(input))


def _gather(
    params: Any,
    indices: Any,
    validate_indices: Any = None,
    axis: int | None = None,
    batch_dims: int = 0,
    name: str | None = None,
) -> Any:
    """Picks entries by number, the same along an axis or, with `batch_dims`, row by row."""
    del validate_indices, name
    axis = batch_dims if axis is None else axis
    if batch_dims == 0:
        return ops.take(params, indices, axis=axis)
    rank = len(params.shape)
    if axis % rank == batch_dims == rank - 1 and len(indices.shape) == rank:
        return ops.take_along_axis(params, indices, axis=axis)
    raise UnsupportedModelError(
        f"tf.gather with axis={axis}, batch_dims={batch_dims} on symbolic tensors of shapes "
        f"{tuple(params.shape)} and {tuple(indices.shape)}; it is understood with batch_dims=0, or "
        "along the last axis"
    )
