"""Keras' own file format, written whole or not at all, and read with a clear word if damaged."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import keras

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.archives import refuse_bomb
from tf_kfacprune.export.atomic import atomic_file

__all__ = ["keras_file", "load_keras"]


def keras_file(
    model: keras.Model, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Writes a model to a ``.keras`` file, whole or not at all.

    Args:
        model: any Keras model that Keras can save.
        path: the file to write, ending in ``.keras``.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        ExportError: if the name does not end in ``.keras``, the path exists or cannot be written.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.export.keras_file(small, "small.keras")  # doctest: +SKIP
        PosixPath('small.keras')
    """
    if Path(path).suffix != ".keras":
        raise ExportError(f"{os.fspath(path)}: the name of a Keras model must end in .keras.")
    with atomic_file(path, overwrite=overwrite) as partial:
        model.save(partial)
    return Path(path)


def load_keras(path: str | os.PathLike[str]) -> keras.Model:
    """Reads a model from a ``.keras`` file, in Keras' safe mode.

    Args:
        path: a file that `keras_file` or ``model.save`` wrote.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: if the file is missing, truncated, not a Keras model, needs a class
            that is not registered, or unpacks to far more than it holds.

    Examples:
        >>> import tf_kfacprune as kp
        >>> net = kp.export.load_keras("small.keras")  # doctest: +SKIP
    """
    file = Path(path)
    if not file.is_file():
        raise InvalidArgumentError(f"{file}: no such file. Expected a .keras model.")
    if file.suffix != ".keras":
        raise InvalidArgumentError(
            f"{file}: expected a file that ends in .keras. Save the model with model.save(path)."
        )
    if not zipfile.is_zipfile(file):
        raise InvalidArgumentError(
            f"{file}: not a complete .keras file ({file.stat().st_size} bytes). It may be "
            "truncated: save or copy it again."
        )
    refuse_bomb(file)
    try:
        return keras.models.load_model(file)
    # What damaged contents raise depends on where the damage is: zip, JSON, HDF5 or Keras errors.
    except Exception as error:
        unknown = re.search(r"Could not locate (?:class|function) '[^']*'", str(error))
        if unknown:
            raise InvalidArgumentError(
                f"{file}: Keras cannot load this model: {unknown[0]}. Decorate it with "
                "@keras.saving.register_keras_serializable() and import its module before; for a "
                "command of kfacprune by --import=module."
            ) from error
        raise InvalidArgumentError(
            f"{file}: Keras cannot load this model: {_first_line(error)} Save or copy the file "
            "again."
        ) from error


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}"
