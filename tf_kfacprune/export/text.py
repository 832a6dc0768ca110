"""Text that a model takes or returns.

Here strings are NumPy bytes in UTF-8 (dtype ``S``): TensorFlow takes them as they are, and ``.npz``
files hold them without pickle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_kfacprune.errors import DataError

__all__ = ["TEXT", "are_strings", "as_bytes", "holds_text"]

# Keras' name of the element type.
TEXT = "string"


def holds_text(array: np.ndarray) -> bool:
    """Whether an array holds text in the form of this module."""
    return array.dtype.kind == "S"


def are_strings(values: Any) -> bool:
    """Whether values are a list or tuple of Python strings."""
    return isinstance(values, list | tuple) and all(isinstance(v, str | bytes) for v in values)


def as_bytes(array: np.ndarray, where: str) -> np.ndarray:
    """Strings of any kind as bytes in UTF-8.

    Args:
        array: Python strings or bytes, NumPy strings or bytes, in any shape.
        where: what it is, for messages.

    Returns:
        An array of the same shape and dtype ``S``.

    Raises:
        DataError: if it holds something else, or bytes that NumPy does not keep.
    """
    found = [_encoded(value, where) for value in array.astype(object).ravel()]
    return np.array(found, dtype=bytes).reshape(array.shape)


def _encoded(value: Any, where: str) -> bytes:
    if not isinstance(value, str | bytes):
        raise DataError(
            f"{where} must hold strings: the model takes text there. Found "
            f"{type(value).__name__}: {value!r}."
        )
    encoded = value.encode() if isinstance(value, str) else value
    if encoded.endswith(b"\0"):
        raise DataError(
            f"{where} must hold strings that do not end in a zero byte, which NumPy drops. Found "
            f"{value[-20:]!r}. Leave that example out."
        )
    return encoded
