"""`kfacprune evaluate`: accuracy of a `.keras` or `.tflite` file on a data set."""

from __future__ import annotations

import numpy as np
from absl import flags

from tf_kfacprune.cli.command import Command
from tf_kfacprune.cli.shared import (
    add_data_flags,
    fitted_inputs,
    load_data,
    suffix_of,
)
from tf_kfacprune.data import Dataset
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.export import load_keras, run_tflite
from tf_kfacprune.reporting import accuracy

__all__ = ["command"]


def command() -> Command:
    """The command, with flags of its own."""
    return Command("evaluate", "Measure the accuracy of a model file.", _define, _execute)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        None,
        "Path of a .keras or .tflite file.",
        flag_values=values,
        required=True,
    )
    add_data_flags(values)


def _execute(values: flags.FlagValues) -> None:
    suffix = suffix_of(values.model)
    if suffix not in (".keras", ".tflite"):
        raise InvalidArgumentError(
            "--model must be the path of a .keras or .tflite file. "
            f"Received: --model={values.model}"
        )
    dataset = load_data(values)
    if suffix == ".keras":
        model = load_keras(values.model)
        reached = accuracy(model, fitted_inputs(model, dataset.x_test), dataset.y_test)
    else:
        reached = _tflite_accuracy(values.model, dataset)
    right = round(reached * len(dataset.y_test))
    print(f"{dataset.name}: accuracy {100 * reached:.2f} % ({right} of {len(dataset.y_test)})")


def _tflite_accuracy(path: str, dataset: Dataset) -> float:
    outputs = run_tflite(path, dataset.x_test)
    if not isinstance(outputs, np.ndarray) or outputs.ndim != 2:
        raise InvalidArgumentError(f"{path}: expected one output of shape (n, classes).")
    return float(np.mean(outputs.argmax(axis=-1) == dataset.y_test))
