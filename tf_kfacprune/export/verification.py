"""Compares what a written file computes with what the Keras model computes.

| symbol | meaning |
| --- | --- |
| y | output of the Keras model, one output, all examples |
| y' | output of the file on the same inputs |

Float formats are held to the largest error, max|y' - y| / max|y|; integer formats, where single
values may saturate, to the root mean square error, rms(y' - y) / rms(y). The tolerances follow from
the rounding unit of the stored weights: errors of many layers add up to tens of units. Outputs that
are integers or text themselves, such as class numbers or names, are held to the fraction of them
that differ.

Integer files of a classifier must also choose the same classes. Examples count where the Keras
model is decided: its best output is ahead of the second by more than the error that is tolerated.
With labels, the accuracy of the file must not be lower than that of the model by more than is
allowed, or than one example makes. A single output decides between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np

from tf_kfacprune.errors import DataError, ExportError
from tf_kfacprune.export.half_precision import ROUNDING_UNITS, half_dtypes
from tf_kfacprune.export.samples import Examples, Named
from tf_kfacprune.export.serving import Signature
from tf_kfacprune.export.text import holds_text

__all__ = [
    "TOLERANCES",
    "Verification",
    "compare_outputs",
    "compute_tolerance",
    "finite_reference",
    "verify_outputs",
]

# Rounding units: float32 2^-24, float16 2^-11; int8 2^-8 and int4 2^-4 of the largest weight of a
# channel.
TOLERANCES: dict[str | None, float] = {
    None: 1e-4,
    "float16": 1e-2,
    "dynamic": 0.1,
    "int8": 0.2,
    "int16x8": 0.1,
    "qat": 0.2,
    "weight_only": 0.1,
    "int4": 0.5,
}
_INTEGER = {"dynamic", "weight_only", "int4", "int8", "int16x8", "qat"}
# Networks in half precision differ from float32 by 1 to 5 rounding units of their dtype (a Dense
# net, LeNet-5, ResNet-20, MobileNetV2, an LSTM and a transformer of four blocks, untrained).
_HALF_PRECISION_UNITS = 20
_LEAST_AGREEMENT = 0.95


@dataclass(frozen=True)
class Verification:
    """How closely a file follows the Keras model.

    Attributes:
        examples: number of examples compared.
        error: largest relative error over the outputs, in the measure of the format.
        agreement: fraction of the examples on which the model is decided where the file chooses
            the same class; None if the model is no classifier with one output.
        accuracy: fraction of right predictions of the file; None without labels, and where they are
            values to be predicted.
        model_accuracy: the same of the Keras model.
    """

    examples: int
    error: float
    agreement: float | None = None
    accuracy: float | None = None
    model_accuracy: float | None = None


def compute_tolerance(model: keras.Model, quantization: str | None = None) -> float:
    """Allowed relative error of a file: that of its format, or of a half precision model."""
    units = [ROUNDING_UNITS[dtype] for dtype in half_dtypes(model)]
    return max(TOLERANCES[quantization], _HALF_PRECISION_UNITS * max(units, default=0.0))


def finite_reference(model: keras.Model, signature: Signature, inputs: Named) -> Named:
    """The Keras model's outputs, which must be finite to compare anything with them.

    Raises:
        ExportError: if an output has NaN or infinite values.
    """
    outputs = signature.predict(model, inputs)
    for name, values in outputs.items():
        if not _is_finite(values):
            raise ExportError(
                f"Model {model.name!r} returns NaN or infinite values at {name!r}: nothing can be "
                "verified against it, nor scales of integers be found. Check its weights, or pass "
                "inputs that it can handle as verify_data and representative_data."
                + " float16 overflows beyond 65504."
                * ("float16" in half_dtypes(model))
            )
    return outputs


def verify_outputs(
    reference: Named,
    found: Named,
    examples: Examples,
    *,
    tolerance: float,
    quantization: str | None,
    max_accuracy_drop: float,
    what: str,
    trained: Named | None = None,
) -> Verification:
    """Holds a file to the Keras model: values, choices and accuracy.

    Args:
        reference: outputs of the Keras model, by name.
        found: outputs of the file, by name.
        examples: what both were run on, with labels if there are any.
        tolerance: largest relative error allowed.
        quantization: format of the file, which decides the measure.
        max_accuracy_drop: how much lower the accuracy of the file may be, in [0, 1].
        what: the file, for messages.
        trained: outputs of the model that the accuracy is held to, if ``reference`` is that of its
            float32 twin.

    Returns:
        The figures.

    Raises:
        ExportError: if the file does not follow the model.
        DataError: if labels are given that are no classes of this model.
    """
    error = compare_outputs(
        reference, found, tolerance=tolerance, quantization=quantization, what=what
    )
    agreement = accuracy = model_accuracy = None
    if len(reference) == 1:
        (name,) = reference
        agreement = _agreement(reference[name], found[name], tolerance)
        if agreement is not None and agreement < _LEAST_AGREEMENT and quantization in _INTEGER:
            raise ExportError(
                f"{what} does not agree with the Keras model: it chooses the same class for "
                f"{100 * agreement:.1f} % of the examples on which the model is decided, at least "
                f"{100 * _LEAST_AGREEMENT:.0f} % are needed. Nothing was kept. Try 'float16', or "
                "more varied representative_data."
            )
        if examples.labels is not None:
            outputs = (trained or reference)[name]
            model_accuracy = _accuracy(outputs, examples.labels, outputs)
            accuracy = _accuracy(found[name], examples.labels, outputs)
            allowed = max(max_accuracy_drop, 1 / len(examples.labels))
            if (
                accuracy is not None
                and model_accuracy is not None
                and accuracy < model_accuracy - allowed - 1e-9
            ):
                raise ExportError(
                    f"{what} loses too much accuracy: {100 * accuracy:.2f} % against "
                    f"{100 * model_accuracy:.2f} % of the Keras model on {len(examples.labels)} "
                    f"examples, allowed is a drop of {100 * allowed:.2f} points. Nothing was kept. "
                    "Try 'float16' or 'int16x8', or more varied representative_data."
                )
    return Verification(examples.count, error, agreement, accuracy, model_accuracy)


def compare_outputs(
    reference: Named, found: Named, *, tolerance: float, quantization: str | None, what: str
) -> float:
    """Compares the outputs of a file with the Keras model's.

    Args:
        reference: outputs of the Keras model, by name.
        found: outputs of the file, by name.
        tolerance: largest relative error allowed.
        quantization: format of the file, which decides the measure.
        what: the file, for messages.

    Returns:
        The largest relative error over the outputs.

    Raises:
        ExportError: if an output is missing, has another shape, is not finite or is too far off.
    """
    worst = 0.0
    for name, expected in reference.items():
        if name not in found:
            raise ExportError(f"{what} has no output {name!r}. Found {sorted(found)}.")
        values = found[name]
        if values.shape != expected.shape:
            raise ExportError(
                f"{what} returns shape {values.shape} at {name!r}; the Keras model returns "
                f"{expected.shape}."
            )
        if not _is_finite(values):
            raise ExportError(f"{what} returns NaN or infinite values at {name!r}.")
        error = _relative_error(expected, values, quantization)
        if error > tolerance:
            raise ExportError(
                f"{what} does not agree with the Keras model at output {name!r}: relative error "
                f"{error:.2e}, allowed {tolerance:.0e}. Nothing was kept."
                + (
                    " Quantization may cost this model too much: try 'float16', or inputs from "
                    "the real data as verify_data."
                    if quantization in _INTEGER
                    else ""
                )
            )
        worst = max(worst, error)
    return worst


def _is_finite(values: np.ndarray) -> bool:
    return holds_text(values) or bool(np.isfinite(values).all())


def _relative_error(expected: np.ndarray, found: np.ndarray, quantization: str | None) -> float:
    if np.issubdtype(expected.dtype, np.integer) or holds_text(expected):
        return float(np.mean(found != expected))
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    error = np.abs(found - expected)
    if quantization in _INTEGER:
        size, scale = np.sqrt(np.mean(error**2)), np.sqrt(np.mean(expected**2))
    else:
        size, scale = np.max(error), np.max(np.abs(expected))
    return float(size / max(scale, np.finfo(np.float32).tiny)) if size > 0 else 0.0


def _agreement(expected: np.ndarray, found: np.ndarray, tolerance: float) -> float | None:
    """Fraction of equal choices where the choice is not within the error that is tolerated."""
    if expected.ndim != 2 or expected.shape[1] < 2 or holds_text(expected):
        return None
    best = np.sort(expected.astype(np.float64), axis=1)
    decided = best[:, -1] - best[:, -2] > tolerance * np.sqrt(np.mean(best**2))
    if not decided.any():
        return None
    same = expected.argmax(axis=1) == found.argmax(axis=1)
    return float(np.mean(same[decided]))


def _accuracy(outputs: np.ndarray, labels: np.ndarray, trained: np.ndarray) -> float | None:
    """Fraction of right predictions; None where labels are values to be predicted.

    Args:
        outputs: what the file or the model returns.
        labels: class numbers, shape ``(n,)``.
        trained: what the model returns, which tells probabilities from logits.
    """
    if _is_one_number(outputs):
        if not np.isin(labels, (0, 1)).all():
            return None
        is_probability = trained.min() >= 0.0 and trained.max() <= 1.0
        chosen = outputs.reshape(-1) > (0.5 if is_probability else 0.0)
        return float(np.mean(chosen == labels))
    if outputs.ndim == 2 and outputs.shape[1] > 1 and not holds_text(outputs):
        classes, chosen = outputs.shape[1], outputs.argmax(axis=1)
    elif outputs.ndim == 1 and np.issubdtype(outputs.dtype, np.integer):
        classes, chosen = np.iinfo(outputs.dtype).max, outputs  # a model that ends in argmax
    else:
        raise DataError(
            "Accuracy needs one output of shape (n, classes), or of class numbers. Found shape "
            f"{outputs.shape} of {outputs.dtype}. Pass verify_data without labels."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"Labels must be classes from 0 to {classes - 1}. Found {labels.min()} to "
            f"{labels.max()}."
        )
    return float(np.mean(chosen == labels))


def _is_one_number(outputs: np.ndarray) -> bool:
    """Whether there is one real number for each example: a decision, or a value."""
    is_real = not holds_text(outputs) and outputs.dtype.kind == "f"
    return is_real and (outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1))
