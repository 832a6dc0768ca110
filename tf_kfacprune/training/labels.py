"""Checks of what is handed to `fit`, before anything is computed."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import DataError

__all__ = ["check_labels", "check_labels_are_given"]

_SPARSE = "sparse_categorical_crossentropy"


def check_labels_are_given(x: Any, y: Any, loss: Any, name: str) -> None:
    """Checks that there are labels for the loss, where `x` are arrays, which hold none.

    Args:
        x: Inputs as given to `fit`.
        y: Labels as given to `fit`, or None.
        loss: Loss as given to `compile`, or None.
        name: Name of the model.

    Raises:
        DataError: If there are none.
    """
    parts = keras.tree.flatten(x)
    is_array = bool(parts) and all(isinstance(part, np.ndarray) for part in parts)
    if y is None and is_array and any(part is not None for part in keras.tree.flatten(loss)):
        raise DataError(
            f"The loss that {name!r} was compiled with compares outputs with labels. Received: "
            "y=None, beside arrays x. Pass labels, as `fit(x, y)`; those of an autoencoder are its "
            "inputs, `fit(x, x)`."
        )


def check_labels(y: Any, loss: Any, net: keras.Model) -> None:
    """Checks that class numbers exist in the model's output.

    Only arrays for a sparse cross entropy are checked; data sets are watched step by step.

    Args:
        y: Labels as given to `fit`.
        loss: Loss as given to `compile`.
        net: The network.

    Raises:
        DataError: If labels are text or one-hot, or one is negative, too large or no whole number.
    """
    name = getattr(loss, "name", loss) if not callable(loss) else getattr(loss, "name", None)
    outputs = list(getattr(net, "outputs", None) or [])  # a subclassed model has no list of them
    if name != _SPARSE or not isinstance(y, np.ndarray) or len(outputs) != 1 or not y.size:
        return
    classes = outputs[0].shape[-1]
    if y.dtype.kind not in "biuf":
        raise DataError(
            f"Labels `y` must be class numbers. Received: an array of dtype {y.dtype}. Number the "
            "classes: `names, y = np.unique(y, return_inverse=True)`."
        )
    if y.ndim == len(outputs[0].shape) and y.shape[-1] != 1:
        raise DataError(
            f"Labels `y` must be class numbers, one where model {net.name!r} has {classes} "
            f"outputs. Received: an array of shape {y.shape}. For one-hot labels use "
            "keras.losses.CategoricalCrossentropy, or take `y.argmax(-1)`."
        )
    ignored = getattr(loss, "ignore_class", None)
    y = y if ignored is None else y[y != ignored]
    if not y.size:
        return
    lowest, highest = y.min(), y.max()
    if not (lowest >= 0 and highest < classes) or not np.all(y == np.floor(y)):
        raise DataError(
            f"Labels `y` must be whole class numbers from 0 to {classes - 1}, for model "
            f"{net.name!r} has {classes} outputs. Received: values from {lowest} to {highest}"
        )
