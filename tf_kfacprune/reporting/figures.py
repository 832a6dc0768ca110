"""Plain figures of one model, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import DataError, InvalidArgumentError
from tf_kfacprune.export.conversion import convert
from tf_kfacprune.export.file_sizes import FileSize
from tf_kfacprune.export.serving import Signature, check_exportable

__all__ = ["ModelFigures", "accuracy", "tflite_size"]

_BATCH = 512


@dataclass(frozen=True)
class ModelFigures:
    """What is known about one model; None where something was not measured.

    Attributes:
        neurons: layer or input -> number of channels it creates.
        params: number of weights, biases and normalization statistics included.
        macs: multiply-accumulates of one inference, without biases.
        tflite: size of the float32 ``.tflite`` file.
        accuracy: fraction of right predictions, in [0, 1].
        latency_us: microseconds of one inference.
    """

    neurons: Mapping[str, int] = field(default_factory=dict)
    params: int | None = None
    macs: int | None = None
    tflite: FileSize | None = None
    accuracy: float | None = None
    latency_us: float | None = None


def tflite_size(model: keras.Model) -> FileSize:
    """Size of the float32 ``.tflite`` file that the model converts to.

    Args:
        model: a built Sequential or Functional model without gates.

    Returns:
        The file's bytes, raw and after gzip. The file itself is not kept.

    Raises:
        UnsupportedModelError: if the model cannot be exported.
        ExportError: if the converter fails.
    """
    check_exportable(model)
    return FileSize.of(convert(model, Signature.of(model)))


def accuracy(model: keras.Model, x: Any, y: Any) -> float:
    """Fraction of examples whose largest output is the labelled class.

    Args:
        model: a classifier with one output of at least two classes, logits or probabilities.
        x: inputs, as the model takes them.
        y: integer labels, shape ``(n,)`` or ``(n, 1)``.

    Returns:
        Accuracy in [0, 1].

    Raises:
        InvalidArgumentError: if the model does not have one output of at least two classes.
        DataError: if labels and predictions differ in number.
    """
    outputs = model.predict(x, batch_size=_BATCH, verbose=0)
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2 or outputs.shape[1] < 2:
        found = outputs.shape if isinstance(outputs, np.ndarray) else type(outputs).__name__
        raise InvalidArgumentError(
            f"Accuracy needs one output of shape (n, classes) with at least 2 classes. Model "
            f"{model.name!r} returns {found}. Measure it yourself and pass the number."
        )
    labels = np.asarray(y).reshape(-1)
    if len(labels) != len(outputs):
        raise DataError(f"Found {len(labels)} labels for {len(outputs)} inputs.")
    return float(np.mean(outputs.argmax(axis=1) == labels))
