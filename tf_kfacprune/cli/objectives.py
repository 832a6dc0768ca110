"""What is minimized and what is measured: ``--loss`` and ``--metric``, or what the data ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from absl import flags

from tf_kfacprune.cli.command import UsageError
from tf_kfacprune.cli.models import number_of_outputs
from tf_kfacprune.data import Dataset
from tf_kfacprune.errors import NonFiniteError
from tf_kfacprune.graph import network_of

__all__ = ["Objective", "add_objective_flags", "kind_asked_for", "objective_for"]

_SPARSE, _BINARY = "sparse_categorical_crossentropy", "binary_crossentropy"
_SQUARED, _ABSOLUTE = "mean_squared_error", "mean_absolute_error"
_ACCURACY = "accuracy"

# What a loss takes as labels.
_KINDS = {_SPARSE: "classes", _BINARY: "binary", _SQUARED: "values", _ABSOLUTE: "values"}
_LOSSES = {"classes": _SPARSE, "binary": _BINARY, "values": _SQUARED}
_METRICS = {
    "classes": (_ACCURACY,),
    "binary": (_ACCURACY, _ABSOLUTE, _SQUARED),
    "values": (_ABSOLUTE, _SQUARED),
}


def add_objective_flags(values: flags.FlagValues) -> None:
    """Defines ``--loss`` and ``--metric``."""
    flags.DEFINE_enum(
        "loss",
        None,
        list(_KINDS),
        f"What the model is trained for. By default what the labels ask for: {_SPARSE} for classes "
        f"(integers or text), {_BINARY} for 0 and 1 (several for each example, or a model with "
        f"one output), {_SQUARED} for other numbers. Cross entropy is taken on logits unless "
        "the model ends in a softmax or sigmoid.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "metric",
        None,
        [_ACCURACY, _ABSOLUTE, _SQUARED],
        "What is measured. By default the accuracy of classes and of decisions of 0 or 1 (each "
        f"counts), and the {_ABSOLUTE} of other numbers.",
        flag_values=values,
    )


def kind_asked_for(values: flags.FlagValues) -> str | None:
    """The kind of labels that the flags ask for; None leaves it to the data."""
    return _KINDS.get(values.loss)


@dataclass(frozen=True)
class Objective:
    """A loss and a metric that fit a model and its data.

    Attributes:
        loss: The loss, for `compile`.
        metric: Name of the metric.
        kind: What the labels are: classes, decisions or values.
        threshold: Outputs above it are a decision for 1.
    """

    loss: keras.losses.Loss
    metric: str
    kind: str
    threshold: float

    def metrics(self) -> list[Any]:
        """The metric, for `compile`."""
        if self.metric != _ACCURACY:
            return [self.metric]
        if self.kind == "binary":
            return [keras.metrics.BinaryAccuracy(_ACCURACY, threshold=self.threshold)]
        return [_ACCURACY]

    def measure(self, outputs: np.ndarray, y: np.ndarray) -> float:
        """The metric of what a model returned.

        Args:
            outputs: Shape ``(n, outputs)``.
            y: Labels as the data set has them.

        Returns:
            The mean over all examples and, but for classes, over all outputs.

        Raises:
            NonFiniteError: If an output is NaN or infinite.
        """
        return measured(outputs, y, self.metric, self.kind, self.threshold)


def measured(outputs: np.ndarray, y: np.ndarray, metric: str, kind: str, threshold: float) -> float:
    """`Objective.measure`, for a file whose loss is not known."""
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise NonFiniteError(
            f"The model returns NaN or infinite values for {len(bad)} of {len(outputs)} examples, "
            f"the first at index {bad[0]}: nothing can be measured. Its weights may hold them, "
            "from a training that diverged."
        )
    if kind == "classes":
        return float(np.mean(outputs.argmax(axis=1) == y))
    if metric == _ACCURACY:
        return float(np.mean((outputs > threshold) == (y > 0.5)))
    error = outputs.astype("float64") - y
    return float(np.mean(np.abs(error) if metric == _ABSOLUTE else error**2))


def objective_for(
    values: flags.FlagValues, model: keras.Model, dataset: Dataset
) -> tuple[Objective, Dataset]:
    """The loss and the metric of a run, and the data with labels in their form.

    Args:
        values: The parsed flags.
        model: The network.
        dataset: The data, loaded with `kind_asked_for`.

    Returns:
        The objective, and the data set: two classes for a network with one output become
        decisions.

    Raises:
        UsageError: If the flags do not go with each other, with the network's outputs or with its
            last activation.
    """
    outputs, last = number_of_outputs(model), last_activation(model)
    if dataset.kind == "classes" and len(np.unique(dataset.y_train)) == 1:
        raise UsageError(
            f"--data: all training examples of {dataset.name!r} are of class "
            f"{dataset.y_train[0]}, so that there is nothing to learn. Save examples of every "
            "class; if the labels are numbers to predict, pass --loss=mean_squared_error."
        )
    dataset = fitted_labels(dataset, outputs, model.name)
    metric = metric_for(values, dataset.kind)
    loss = values.loss or _LOSSES[dataset.kind]
    wrong = {_SPARSE: "sigmoid", _BINARY: "softmax"}.get(loss)
    if last is not None and last == wrong:
        other = _BINARY if loss == _SPARSE else _SPARSE
        raise UsageError(
            f"--loss={loss} does not go with a model that ends in a {last}. Received: model "
            f"{model.name!r}. Save it without its last activation, or with --loss={other} train it "
            "on labels of that kind."
        )
    from_logits = last is None
    losses = {
        _SPARSE: lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
        _BINARY: lambda: keras.losses.BinaryCrossentropy(from_logits=from_logits),
        _SQUARED: keras.losses.MeanSquaredError,
        _ABSOLUTE: keras.losses.MeanAbsoluteError,
    }
    threshold = 0.0 if from_logits else 0.5
    return Objective(losses[loss](), metric, dataset.kind, threshold), dataset


def metric_for(values: flags.FlagValues, kind: str) -> str:
    """The metric that the flags ask for, or the first one of this kind of labels.

    Raises:
        UsageError: If it does not go with them.
    """
    metric = values.metric or _METRICS[kind][0]
    if metric not in _METRICS[kind]:
        raise UsageError(
            f"--metric={metric} does not go with labels that are {kind}. Choose one of "
            f"{', '.join(_METRICS[kind])}."
        )
    return metric


def fitted_labels(dataset: Dataset, outputs: int, model: str) -> Dataset:
    """The data set, with two classes as decisions if there is one output.

    Raises:
        UsageError: If the numbers of outputs and labels do not fit.
    """
    if dataset.kind == "classes" and outputs == 1 and dataset.num_classes == 2:
        y_train, y_test = (
            y.reshape(-1, 1).astype("float32") for y in (dataset.y_train, dataset.y_test)
        )
        return replace(dataset, y_train=y_train, y_test=y_test, num_classes=1, kind="binary")
    meaning = {"classes": "classes", "binary": "decisions", "values": "values"}[dataset.kind]
    fits = outputs == dataset.num_classes
    if dataset.kind == "classes":  # a network may know more classes than the data have
        fits = outputs >= dataset.num_classes and outputs > 1
    if not fits:
        raise UsageError(
            f"--data: model {model!r} has {outputs} outputs, and data set {dataset.name!r} has "
            f"{dataset.num_classes} {meaning}. Choose data that fit the model, or a model with as "
            "many outputs; if the labels are of another kind, say so with --loss."
        )
    return dataset


def last_activation(model: Any) -> str | None:
    """``"softmax"`` or ``"sigmoid"`` if the model ends in one; None if it returns logits."""
    last = network_of(model).layers[-1]
    if isinstance(last, keras.layers.Softmax):
        return "softmax"
    activation = getattr(last, "activation", None)
    for name in ("softmax", "sigmoid"):
        if activation is getattr(keras.activations, name):
            return name
    return None
