"""Flags that several commands have, and what they stand for: data sets and models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags

from tf_kfacprune import zoo
from tf_kfacprune.data import NAMES, Dataset, load
from tf_kfacprune.errors import DataError, InvalidArgumentError
from tf_kfacprune.export import load_keras

__all__ = [
    "add_data_flags",
    "add_output_flags",
    "add_selection_flags",
    "fitted_inputs",
    "load_data",
    "loss_for",
    "model_named",
    "model_of",
]


def add_data_flags(values: flags.FlagValues, default: str | None = "digits") -> None:
    """Defines ``--data`` and ``--data_dir``."""
    flags.DEFINE_string(
        "data",
        default,
        f"Data set: {', '.join(NAMES)}, or the path of an .npz file with x_train, y_train, x_test "
        "and y_test.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder with the files of the data set; without it Keras downloads them.",
        flag_values=values,
    )


def add_output_flags(values: flags.FlagValues, name: str, help_text: str) -> None:
    """Defines the required output flag and ``--overwrite``."""
    flags.DEFINE_string(name, None, help_text, flag_values=values, required=True)
    flags.DEFINE_bool(
        "overwrite", False, "Replace an output that exists already.", flag_values=values
    )


def add_selection_flags(values: flags.FlagValues) -> None:
    """Defines ``--include`` and ``--exclude``."""
    flags.DEFINE_list(
        "include",
        [],
        "Layers that may lose neurons, comma-separated names or regular expressions; default: all.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "exclude",
        [],
        "Layers that keep all their neurons, likewise; wins over --include.",
        flag_values=values,
    )


def load_data(values: flags.FlagValues) -> Dataset:
    """The data set that ``--data`` and ``--data_dir`` name."""
    return load(values.data, values.data_dir)


def model_named(name: str, dataset: Dataset | None = None, seed: int | None = None) -> keras.Model:
    """The model that a ``--model`` flag names.

    Args:
        name: A built-in network, or the path of a ``.keras`` file.
        dataset: A built-in network is made for its examples and classes.
        seed: Seed of a built-in network's weights.

    Returns:
        The model; one from a file may be a `PrunableModel`.

    Raises:
        InvalidArgumentError: If there is no such network or file, or it does not fit the data.
    """
    if name.endswith(".keras"):
        return load_keras(name)
    if name not in zoo.NAMES:
        raise InvalidArgumentError(
            f"--model must be one of {', '.join(zoo.NAMES)}, or the path of a .keras file. "
            f"Received: --model={name}"
        )
    if dataset is None:
        return zoo.build(name, seed=seed)
    return zoo.build(name, dataset.input_shape, dataset.num_classes, seed)


def model_of(path: str, purpose: str) -> keras.Model:
    """A model that must come from a ``.keras`` file.

    Raises:
        InvalidArgumentError: If the path does not name a complete ``.keras`` file.
    """
    if not path.endswith(".keras"):
        raise InvalidArgumentError(
            f"--model must be the path of a .keras file to {purpose}. Received: --model={path}"
        )
    return load_keras(path)


def fitted_inputs(model: Any, x: np.ndarray) -> np.ndarray:
    """Examples in the shape that a model takes: as they are, or flattened.

    Args:
        model: A model with one input.
        x: Examples, shape ``(n, ...)``.

    Returns:
        ``x``, or ``x`` reshaped without changing the order of values.

    Raises:
        DataError: If the shapes do not fit.
    """
    shape = getattr(model, "net", model).input_shape
    if not isinstance(shape, tuple):
        raise DataError("The model must have one input. Received: several. Use the Python API.")
    return reshaped(x, shape[1:])


def reshaped(x: np.ndarray, wanted: tuple[int | None, ...]) -> np.ndarray:
    """`fitted_inputs`, for a shape without the batch axis."""
    found = x.shape[1:]
    if len(found) == len(wanted) and all(
        w in (None, f) for w, f in zip(wanted, found, strict=True)
    ):
        return x
    if len(wanted) == 1 and wanted[0] == math.prod(found):
        return x.reshape(len(x), -1)
    raise DataError(
        f"The model takes examples of shape {tuple(wanted)}, but the data have {found}. Choose "
        "data that fit the model, or build the model for them."
    )


def loss_for(model: keras.Model) -> keras.losses.Loss:
    """Cross entropy for integer labels, on logits unless the model ends in a softmax."""
    last = model.layers[-1]
    ends_in_softmax = isinstance(last, keras.layers.Softmax) or (
        getattr(last, "activation", None) is keras.activations.softmax
    )
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not ends_in_softmax)


def suffix_of(path: str) -> str:
    """Lower-case suffix of a path, such as ``.keras``."""
    return Path(path).suffix.lower()
