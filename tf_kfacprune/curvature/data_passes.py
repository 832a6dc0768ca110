"""A data set as batches in a fixed order, for diagnostics that pass over it many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_kfacprune.errors import DataError

__all__ = ["arrays_of", "batches_of", "gathered", "length_of"]


def batches_of(data: Any, batch_size: int) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Prepares repeated passes over a data set.

    Args:
        data: ``(x, y)`` arrays (x may be nested), or a `tf.data.Dataset` of batches ``(x, y)``.
        batch_size: Number of examples per batch when ``data`` holds arrays.

    Returns:
        A function that starts a new pass and yields batches ``(x, y)`` in the order of the data.

    Raises:
        DataError: If the data are empty, of unequal lengths, endless, or no pair.
    """
    if isinstance(data, tf.data.Dataset):
        if data.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise DataError("data: the tf.data.Dataset has no end. Leave out its `.repeat()`.")
        return lambda: (_checked(*_pair(element)) for element in data)
    x, y = arrays_of(*_pair(data))
    total = length_of(y)

    def batches() -> Iterator[tuple[Any, Any]]:
        for start in range(0, total, batch_size):
            part = slice(start, start + batch_size)
            yield keras.tree.map_structure(lambda a, s=part: tf.convert_to_tensor(a[s]), (x, y))

    return batches


def gathered(data: tf.data.Dataset) -> tuple[Any, Any]:
    """All examples of a `tf.data.Dataset` of batches ``(x, y)`` as arrays, or structures of them.

    Raises:
        DataError: If there is none, or no end of them, or elements are no pairs.
    """
    batches = list(batches_of(data, 1)())
    if not batches:
        raise DataError("data: the tf.data.Dataset has no batch.")
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)


def arrays_of(x: Any, y: Any) -> tuple[Any, Any]:
    """Inputs and labels as arrays, or structures of them, of one length.

    A list of numbers or of rows is one array; a list of arrays is a structure of several.

    Raises:
        DataError: If they are empty or of unequal lengths.
    """

    def array(part: Any) -> Any:
        is_plain = isinstance(part, list | tuple) and not any(getattr(p, "shape", ()) for p in part)
        return np.asarray(part) if is_plain else part

    return _checked(array(x), array(y))


def _length(part: Any) -> int:
    shape = getattr(part, "shape", None)
    if shape is None:
        return len(part)
    return int(shape[0]) if len(shape) else 0


def _checked(x: Any, y: Any) -> tuple[Any, Any]:
    lengths = sorted({_length(part) for part in keras.tree.flatten((x, y))})
    if len(lengths) != 1 or lengths[0] == 0:
        raise DataError(
            "data: x and y must have the same number of examples, at least one, along their first "
            f"axis. Received: {lengths}"
        )
    return x, y


def _pair(element: Any) -> tuple[Any, Any]:
    if not isinstance(element, tuple | list) or len(element) != 2:
        received = f"{type(element).__name__}" + (
            f" of {len(element)} elements" if isinstance(element, tuple | list) else ""
        )
        raise DataError(
            "data must be a pair (x, y) of arrays, or a tf.data.Dataset of batches (x, y) without "
            f"sample weights. Received: {received}"
        )
    return element[0], element[1]


def length_of(part: Any) -> int:
    """Number of examples in the inputs or the labels of a batch."""
    return _length(keras.tree.flatten(part)[0])
