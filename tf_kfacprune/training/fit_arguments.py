"""Arrays given to `fit` become data sets that do not stall between epochs."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_kfacprune.data import batches

__all__ = ["batched"]

_BATCH_SIZE = 32  # Keras' default
# What `fit` may be given beside the arrays. Everything else (weights, a share for validation,
# steps) is left to Keras.
_UNDERSTOOD = {
    "batch_size",
    "epochs",
    "initial_epoch",
    "verbose",
    "callbacks",
    "shuffle",
    "validation_data",
    "validation_batch_size",
    "validation_freq",
}


def batched(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replaces a pair of arrays by `kp.data.batches`, the same of the validation data.

    Args:
        arguments: What `fit` was given, by name.

    Returns:
        Arguments that have the same effect; the given ones where there is anything but arrays.
    """
    rest = {name: value for name, value in arguments.items() if name not in ("x", "y")}
    x: Any = arguments.get("x")
    y: Any = arguments.get("y")
    shuffle = rest.pop("shuffle", True)
    if not (_are_arrays(x, y) and rest.keys() <= _UNDERSTOOD and isinstance(shuffle, bool)):
        return arguments
    batch_size = rest.pop("batch_size", None) or _BATCH_SIZE
    validation_batch_size = rest.pop("validation_batch_size", None) or batch_size
    validation = rest.get("validation_data")
    if isinstance(validation, tuple) and len(validation) == 2 and _are_arrays(*validation):
        rest["validation_data"] = batches(*validation, validation_batch_size, shuffle=False)
    elif validation is not None:
        return arguments
    return {"x": batches(x, y, batch_size, shuffle=shuffle), "shuffle": False, **rest}


def _are_arrays(x: Any, y: Any) -> bool:
    is_pair = all(isinstance(array, np.ndarray) and array.ndim for array in (x, y))
    return is_pair and len(x) == len(y) > 0
