"""Writes a lean SavedModel: each weight once, one named signature, no class of this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.atomic import atomic_directory
from tf_kfacprune.export.console import ConsoleLog, captured_console, log_kept_on_error
from tf_kfacprune.export.options import check_drop
from tf_kfacprune.export.running import run_saved_model
from tf_kfacprune.export.samples import Examples, labelled_examples, random_examples
from tf_kfacprune.export.serving import SIGNATURE, Signature, check_exportable, served_module
from tf_kfacprune.export.verification import (
    compute_tolerance,
    finite_reference,
    verify_outputs,
)

__all__ = ["saved_model", "write_served"]


def saved_model(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    batch_size: int | None = None,
    verify: bool = True,
    verify_data: Any = None,
    max_accuracy_drop: float = 0.01,
) -> Path:
    """Writes a SavedModel that needs only TensorFlow, and proves it to be the same network.

    The folder holds each weight once and the signature ``serving_default``, whose inputs and
    outputs have stable names: those of the model's Inputs (or ``input``), and ``output``.

    Args:
        model: a built Sequential or Functional model without gates (see `compact`).
        path: the folder to write. It appears whole or not at all.
        overwrite: replace an existing SavedModel.
        batch_size: the only batch size served; None serves any.
        verify: load the written folder in a process without this package, and compare its outputs
            with the model's.
        verify_data: inputs to compare on: an array, a list or dictionary of arrays, or an
            iterable of batches; the first 256 examples are taken. Random inputs by default; a
            model that takes text needs strings here. With labels, ``(x, y)``, accuracies are
            compared too, on up to 10,000 examples.
        max_accuracy_drop: how much lower the accuracy of the written folder may be, in [0, 1]; one
            example may always change sides.

    Returns:
        ``path``.

    Raises:
        UnsupportedModelError: if the model has gates or symbolic inputs are missing.
        InvalidArgumentError: if ``verify_data`` is needed: for text and for inputs of free size.
        DataError: if ``verify_data`` does not fit the model.
        ExportError: if the path exists or cannot be written, or the written folder does not agree
            with the model; nothing is left behind then, and the message names the log.

    Examples:
        >>> import keras, tf_kfacprune as kp
        >>> net = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(2)])
        >>> kp.export.saved_model(net, "net")  # doctest: +SKIP
        PosixPath('net')
    """
    check_exportable(model, batch_size)
    check_drop(max_accuracy_drop)
    signature = Signature.of(model, batch_size)
    examples = None
    if verify:
        examples = (
            Examples(random_examples(signature))
            if verify_data is None
            else labelled_examples(verify_data, signature, "verify_data")
        )
    with (
        log_kept_on_error(path) as log,
        atomic_directory(path, marker="saved_model.pb", overwrite=overwrite) as partial,
    ):
        write_served(model, signature, partial, log)
        if examples is not None:
            what = f"The SavedModel for {path}"
            verify_outputs(
                finite_reference(model, signature, examples.inputs),
                run_saved_model(partial, examples.inputs, what=what),
                examples,
                tolerance=compute_tolerance(model),
                quantization=None,
                max_accuracy_drop=max_accuracy_drop,
                what=what,
            )
    return Path(path)


def write_served(
    model: keras.Model, signature: Signature, folder: Path, log: ConsoleLog | None = None
) -> dict[str, str]:
    """Writes the served function of ``model`` into ``folder``, without verification.

    Returns:
        The element types of its outputs, by name. Keras' own record of them is wrong for layers
        that return text.

    Raises:
        ExportError: with the log, if TensorFlow cannot write it.
    """
    import tensorflow as tf

    log = ConsoleLog() if log is None else log
    try:
        with captured_console(log):
            module, endpoint = served_module(model, signature)
            tf.saved_model.save(module, os.fspath(folder), signatures={SIGNATURE: endpoint})
    except (ValueError, TypeError, AssertionError, RuntimeError, tf.errors.OpError) as error:
        raise ExportError(
            f"Model {model.name!r} cannot be written as a SavedModel: {error}\n{log.tail}"
        ) from error
    return {name: tensor.dtype.name for name, tensor in endpoint.structured_outputs.items()}
