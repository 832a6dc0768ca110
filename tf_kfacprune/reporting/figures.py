"""Plain figures of one model, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tf_kfacprune.curvature.data_passes import arrays_of, length_of
from tf_kfacprune.curvature.diagnostics import hessian_spectrum
from tf_kfacprune.errors import (
    DataError,
    ExportError,
    InvalidArgumentError,
    NonFiniteError,
    UnsupportedModelError,
)
from tf_kfacprune.export.conversion import convert
from tf_kfacprune.export.file_sizes import FileSize
from tf_kfacprune.export.serving import Signature, check_exportable

__all__ = ["Flatness", "ModelFigures", "accuracy", "flatness_of", "measures", "tflite_size"]

_BATCH = 512
_LEAST_BATCH = 32  # below this, one batch of everything is the quicker way to an even size
# A report needs two digits of an eigenvalue, from as many examples as fit in one product.
_FLATNESS_EXAMPLES = 500
_FLATNESS_TOLERANCE = 1e-2
_FLATNESS_PRODUCTS = 30


@dataclass(frozen=True)
class Flatness:
    """How flat the minimum is that a model lies in.

    Attributes:
        top: Largest eigenvalue of the Hessian of the mean loss; None if it could not be computed.
        scale_invariant: The same with every weight measured in the norm of its layer's weights, so
            that networks of different size and scale can be compared.
        num_examples: Number of examples that the loss was taken over.
        reason: Why nothing was computed, or None.
    """

    top: float | None
    scale_invariant: float | None
    num_examples: int
    reason: str | None = None


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
        flatness: eigenvalues of the curvature.
        measures: name -> loss and metrics that the model was compiled with.
    """

    neurons: Mapping[str, int] = field(default_factory=dict)
    params: int | None = None
    macs: int | None = None
    tflite: FileSize | None = None
    accuracy: float | None = None
    latency_us: float | None = None
    flatness: Flatness | None = None
    measures: Mapping[str, float] = field(default_factory=dict)


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
    try:
        return FileSize.of(convert(model, Signature.of(model)))
    except ExportError:  # recurrent layers convert for a fixed batch only
        return FileSize.of(convert(model, Signature.of(model, 1)))


def measures(model: keras.Model, x: Any, y: Any, trained: keras.Model) -> dict[str, Any]:
    """How good a model is: its accuracy, or the loss and the metrics that it was compiled with.

    Args:
        model: a classifier of one class number per example, or any model.
        x: inputs, as the model takes them.
        y: labels or targets, as its loss takes them.
        trained: what tells the loss and the metrics if the model itself is not compiled.

    Returns:
        The fields ``accuracy`` or ``measures`` of `ModelFigures`.

    Raises:
        InvalidArgumentError: if the model is no classifier and neither of the two is compiled.
        DataError: if inputs and labels differ in number, or labels are no class numbers.
    """
    x, y = arrays_of(x, y)
    compiled = model if model.compiled else trained
    if _returns_classes(model) and _is_one_number_each(y) and _is_of_class_numbers(compiled):
        return {"accuracy": accuracy(model, x, y)}
    if not compiled.compiled:
        raise InvalidArgumentError(
            f"Model {model.name!r} is no classifier of one class number per example, so that what "
            "`data` measures is not known. Compile it with the loss and the metrics to be shown "
            "(model.compile(loss=..., metrics=[...])), or leave `data` out."
        )
    if not model.compiled:
        model = _compiled_like(model, trained)
    batch = _BATCH if len(model.outputs) == 1 else _even_batch(length_of(x))
    return {"measures": model.evaluate(x, y, batch_size=batch, verbose=0, return_dict=True)}


def _even_batch(count: int) -> int:
    """A batch size without a smaller last batch.

    The losses of single outputs are to Keras means over batches, whatever these hold.
    """
    even = next(size for size in range(min(_BATCH, count), 0, -1) if count % size == 0)
    return even if even >= _LEAST_BATCH else count


def _compiled_like(model: keras.Model, trained: keras.Model) -> keras.Model:
    """The same network, compiled as another one of the same outputs; the model stays as it is."""
    twin = keras.Model(model.input, model.output, name=model.name)
    config = trained.get_compile_config() or {}
    metrics = getattr(trained, "_compile_metrics", None)
    twin.compile(
        loss=trained.loss,
        loss_weights=config.get("loss_weights"),
        metrics=getattr(metrics, "_user_metrics", None),
        weighted_metrics=getattr(metrics, "_user_weighted_metrics", None),
    )
    return twin


def _returns_classes(model: keras.Model) -> bool:
    shape = model.output_shape
    return isinstance(shape, tuple) and len(shape) == 2 and (shape[1] or 0) >= 2


def _is_one_number_each(y: Any) -> bool:
    return not isinstance(y, dict) and np.ndim(y) > 0 and np.shape(y)[1:] in ((), (1,))


def _is_of_class_numbers(model: keras.Model) -> bool:
    """Whether a model's labels are class numbers, as far as its loss tells."""
    if not model.compiled:
        return True
    loss = model.loss
    if isinstance(loss, str) or not isinstance(loss, keras.losses.Loss):
        name = loss if isinstance(loss, str) else getattr(loss, "__name__", "")
        return name.lower().replace("_", "") == "sparsecategoricalcrossentropy"
    return (
        isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        and getattr(loss, "ignore_class", None) is None
    )


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
        DataError: if labels and predictions differ in number, or labels are no class numbers.
        NonFiniteError: if there are predictions that are NaN.
    """
    outputs = model.predict(x, batch_size=_BATCH, verbose=0)
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2 or outputs.shape[1] < 2:
        found = outputs.shape if isinstance(outputs, np.ndarray) else type(outputs).__name__
        raise InvalidArgumentError(
            f"Accuracy needs one output of shape (n, classes) with at least 2 classes. Model "
            f"{model.name!r} returns {found}. Leave `data` out, and measure it by `evaluate`."
        )
    labels = np.asarray(y).reshape(-1)
    if len(labels) != len(outputs):
        raise DataError(
            f"Found {len(labels)} labels for {len(outputs)} inputs. Expected one class number for "
            "each input, shape (n,) or (n, 1)."
        )
    if labels.dtype.kind not in "biuf" or (labels != np.round(labels)).any():
        raise DataError(
            "Labels must be class numbers to be compared with the largest of several outputs. "
            f"Received: {labels[:3].tolist()}... of type {labels.dtype}. Of other labels, what the "
            "model was compiled with is shown: compile it with its loss."
        )
    unknown = int(np.isnan(outputs).any(axis=1).sum())
    if unknown:
        raise NonFiniteError(
            f"Model {model.name!r} predicts NaN for {unknown} of {len(outputs)} examples, so that "
            "there is no accuracy. Look for NaN in its weights and in the data."
        )
    return float(np.mean(outputs.argmax(axis=1) == labels))


def flatness_of(model: keras.Model, x: Any, y: Any, loss: Any) -> Flatness:
    """The top eigenvalue of the exact Hessian, to about two digits, over the first 500 examples.

    Args:
        model: a built model.
        x: inputs, as the model takes them.
        y: labels.
        loss: as given to `compile`.

    Returns:
        The eigenvalues, or the reason why the model has none that can be trusted.
    """
    x, y = keras.tree.map_structure(
        lambda part: np.asarray(part)[:_FLATNESS_EXAMPLES], arrays_of(x, y)
    )
    count = length_of(x)
    tops = []
    for scaling in (None, "norm"):
        try:
            spectrum = hessian_spectrum(
                model,
                (x, y),
                loss,
                scaling=scaling,
                tolerance=_FLATNESS_TOLERANCE,
                max_steps=_FLATNESS_PRODUCTS,
                batch_size=_FLATNESS_EXAMPLES,
            )
        except (UnsupportedModelError, NonFiniteError) as error:
            return Flatness(None, None, count, str(error))
        tops.append(spectrum.top)
    return Flatness(tops[0], tops[1], count)
