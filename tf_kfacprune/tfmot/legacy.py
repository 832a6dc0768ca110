"""Imports tf_keras and tensorflow-model-optimization, and leaves the process as it was."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from tf_kfacprune.errors import ExportError

__all__ = ["Legacy", "is_legacy_model", "legacy_packages"]

_SWITCH = "TF_USE_LEGACY_KERAS"


class Legacy(NamedTuple):
    """The two packages of the extra.

    Attributes:
        keras: ``tf_keras``, the Keras of TensorFlow before version 3.
        tfmot: ``tensorflow_model_optimization``.
    """

    keras: Any
    tfmot: Any


def legacy_packages() -> Legacy:
    """Imports the packages of the extra ``[tfmot]``.

    ``tensorflow_model_optimization`` sets an environment variable that turns ``tf.keras`` into
    ``tf_keras``, for this process and for those it starts. Here ``tf.keras`` is resolved before,
    and the variable is put back.

    Returns:
        The two packages.

    Raises:
        ExportError: if they are not installed.
    """
    import tensorflow as tf

    # Looking at an attribute resolves the lazily loaded tf.keras, once and for all.
    _ = tf.keras.layers
    before = os.environ.get(_SWITCH)
    try:
        import tensorflow_model_optimization as tfmot
        import tf_keras
    except ImportError as error:
        raise ExportError(
            "tensorflow-model-optimization and tf_keras are needed for this and cannot be "
            f"imported ({error}). Install them with pip install 'tf_kfacprune[tfmot]'."
        ) from error
    finally:
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before
    return Legacy(tf_keras, tfmot)


def is_legacy_model(model: Any) -> bool:
    """Whether a model is one of ``tf_keras``, found out without importing it."""
    return any(
        base.__name__ == "Model" and base.__module__.split(".")[0] == "tf_keras"
        for base in type(model).__mro__
    )
