"""`kfacprune evaluate`: accuracy of a `.keras` or `.tflite` file on a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from absl import flags

from tf_kfacprune.cli.command import Command, UsageError, define_number
from tf_kfacprune.cli.models import fitted_inputs, model_of, number_of_outputs, suffix_of
from tf_kfacprune.cli.objectives import (
    add_objective_flags,
    fitted_labels,
    kind_asked_for,
    last_activation,
    measured,
    metric_for,
)
from tf_kfacprune.cli.shared import add_data_flags, load_data
from tf_kfacprune.data import Dataset
from tf_kfacprune.errors import DataError
from tf_kfacprune.export import read_metadata, run_tflite

__all__ = ["command"]


def command() -> Command:
    """The command, with flags of its own."""
    return Command(
        "evaluate", "Measure the accuracy or the error of a model file.", _define, _execute
    )


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        None,
        "Path of a .keras or .tflite file.",
        flag_values=values,
        required=True,
    )
    add_data_flags(values)
    add_objective_flags(values)
    define_number(
        values,
        "threshold",
        None,
        "Outputs above it are a decision for 1, where labels are 0 or 1. By default 0.5 for a "
        "model that ends in a sigmoid, and for a .tflite file all of whose outputs lie between 0 "
        "and 1; else 0, for logits.",
    )


def _execute(values: flags.FlagValues) -> None:
    suffix = suffix_of(values.model)
    if suffix not in (".keras", ".tflite"):
        raise UsageError(
            "--model must be the path of a .keras or .tflite file. "
            f"Received: --model={values.model}"
        )
    dataset = load_data(values, kind_asked_for(values))
    outputs, threshold = (_of_keras if suffix == ".keras" else _of_tflite)(values.model, dataset)
    dataset = fitted_labels(dataset, outputs.shape[1], values.model)
    metric = metric_for(values, dataset.kind)
    if values.threshold is not None:
        if dataset.kind != "binary" or metric != "accuracy":
            raise UsageError(
                f"--threshold={values.threshold:g} has no effect on the {metric} of labels that "
                f"are {dataset.kind}: it is for decisions of 0 or 1. Leave it out."
            )
        threshold = values.threshold
    reached = measured(outputs, dataset.y_test, metric, dataset.kind, threshold)
    examples = len(dataset.y_test)
    if metric != "accuracy":
        print(f"{dataset.name}: {metric} {reached:.6g} ({examples} examples)")
        return
    answers = dataset.y_test.size
    counted = f"{round(reached * answers)} of {answers}"
    if dataset.kind == "binary":
        counted += f", outputs above {threshold:g} taken for 1"
    print(f"{dataset.name}: accuracy {100 * reached:.2f} % ({counted})")


def _of_keras(path: str, dataset: Dataset) -> tuple[np.ndarray, float]:
    """Outputs on the test set, and the threshold of decisions."""
    model = model_of(path, "evaluate")
    number_of_outputs(model)
    outputs = model.predict(fitted_inputs(model, dataset.x_test), verbose=0)
    return outputs, 0.0 if last_activation(model) is None else 0.5


def _of_tflite(path: str, dataset: Dataset) -> tuple[np.ndarray, float]:
    described = read_metadata(path)
    if described is not None and described.labels and dataset.labels:
        _check_labels(path, described.labels, dataset)
    outputs = run_tflite(path, dataset.x_test)
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2:
        raise UsageError(
            f"--model={path}: the command line measures files with one output of shape (examples, "
            "outputs). Use the Python API."
        )
    is_probability = bool(np.all((outputs >= 0) & (outputs <= 1)))
    return outputs, 0.5 if is_probability else 0.0


def _check_labels(path: str, names: Sequence[str], dataset: Dataset) -> None:
    """Names that file and data share must stand for the same numbers of classes."""
    for number, name in enumerate(dataset.labels):
        if name in names and names.index(name) != number:
            raise DataError(
                f"--data={dataset.name}: class {number} is {name!r}, but in {path} class "
                f"{names.index(name)} is. Evaluate the file on data with the classes it was "
                "trained on."
            )
