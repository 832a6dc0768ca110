"""Models that flags name, and the data in the shape that they take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_kfacprune import zoo
from tf_kfacprune.cli.command import FileError, UsageError, naming
from tf_kfacprune.data import Dataset
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.export import load_keras
from tf_kfacprune.graph import network_of

__all__ = [
    "example_shape",
    "fitted_inputs",
    "model_named",
    "model_of",
    "number_of_outputs",
    "reshaped",
    "suffix_of",
]


def model_named(
    name: str, dataset: Dataset | None = None, seed: int | None = None, *, flag: str = "model"
) -> keras.Model:
    """The model that a flag names.

    Args:
        name: A built-in network, or the path of a ``.keras`` file.
        dataset: A built-in network is made for its examples and labels.
        seed: Seed of a built-in network's weights.
        flag: Name of the flag.

    Returns:
        The model, built; one from a file may be a `PrunableModel`.

    Raises:
        UsageError: If there is no such network, or it does not fit the data.
        FileError: If there is no such file, or it is no built model.
    """
    if name.endswith(".keras"):
        return _loaded(name, flag)
    if name not in zoo.NAMES:
        raise UsageError(
            f"--{flag} must be one of {', '.join(zoo.NAMES)}, or the path of a .keras file. "
            f"Received: --{flag}={name}"
        )
    if dataset is None:
        return zoo.build(name, seed=seed)
    with naming(flag, "data"):
        return zoo.build(name, dataset.input_shape, dataset.num_classes, seed)


def model_of(path: str, purpose: str) -> keras.Model:
    """A model that must come from a ``.keras`` file.

    Args:
        path: Path of the file.
        purpose: What is to be done with it.

    Returns:
        The model, built.

    Raises:
        UsageError: If the path does not end in ``.keras``.
        FileError: If it does not name a complete ``.keras`` file of a built model.
    """
    if not path.endswith(".keras"):
        raise UsageError(
            f"--model must be the path of a .keras file to {purpose}. Received: --model={path}"
        )
    return _loaded(path, "model")


def _loaded(path: str, flag: str) -> keras.Model:
    try:
        model = load_keras(path)
    except InvalidArgumentError as error:
        raise FileError(f"--{flag}: {error}") from error
    if not model.built:
        raise FileError(
            f"--{flag}={path}: the model is not built, so the shapes of its layers are not known. "
            "Give it a keras.Input, or call it once on data, and save it again."
        )
    for weight in model.trainable_weights:
        if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
            raise FileError(
                f"--{flag}={path}: weight {weight.path!r} holds NaN or infinite values, from a "
                "training that diverged. Train again with a lower learning rate, or take an "
                "earlier file."
            )
    return model


def example_shape(model: Any) -> tuple[int | None, ...]:
    """Shape of one example of a model, without the batch axis.

    Raises:
        UsageError: If the model does not say, or has several inputs.
    """
    shape = getattr(network_of(model), "input_shape", None)
    if not isinstance(shape, tuple):
        found = "none that is known" if shape is None else f"{len(shape)}"
        raise UsageError(
            f"--model: the command line needs a Sequential or Functional model with "
            f"one input. Model {model.name!r} has {found}. Use the Python API."
        )
    return shape[1:]


def number_of_outputs(model: Any) -> int:
    """How many numbers a model returns for each example.

    Raises:
        UsageError: If it has several outputs, or one of more axes.
    """
    outputs = getattr(network_of(model), "outputs", None) or []
    shapes = [tuple(output.shape) for output in outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] is None:
        found = ", ".join(map(str, shapes)) or "none that is known"
        raise UsageError(
            "--model: the command line measures models with one output of shape (examples, "
            f"outputs). Model {model.name!r} has outputs of shape {found}. Use the Python API."
        )
    return int(shapes[0][1])


def fitted_inputs(model: Any, x: np.ndarray) -> np.ndarray:
    """Examples in the shape that a model takes: as they are, or flattened.

    Args:
        model: A model with one input.
        x: Examples, shape ``(n, ...)``.

    Returns:
        ``x``, or ``x`` reshaped without changing the order of values.

    Raises:
        UsageError: If the shapes do not fit, or the model takes integers and these are none.
    """
    shape = example_shape(model)
    dtype = keras.backend.standardize_dtype(network_of(model).inputs[0].dtype)
    if "int" in dtype and not np.array_equal(x, np.round(x)):
        raise UsageError(
            f"--data: the model takes examples of dtype {dtype}, and the data have fractions, "
            "which would be cut off. Choose data that fit the model, or build it for float32."
        )
    return reshaped(x, shape)


def reshaped(x: np.ndarray, wanted: tuple[int | None, ...]) -> np.ndarray:
    """`fitted_inputs`, for a shape without the batch axis."""
    found = x.shape[1:]
    if len(found) == len(wanted) and all(
        w in (None, f) for w, f in zip(wanted, found, strict=True)
    ):
        return x
    if len(wanted) == 1 and wanted[0] == math.prod(found):
        return x.reshape(len(x), -1)
    raise UsageError(
        f"--data: the model takes examples of shape {tuple(wanted)}, but the data have {found}. "
        "Choose data that fit the model, or build the model for them."
    )


def suffix_of(path: str) -> str:
    """Lower-case suffix of a path, such as ``.keras``."""
    return Path(path).suffix.lower()
