"""Writes a .tflite file and proves that LiteRT computes the same network with it."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import ExportError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export.atomic import atomic_file
from tf_kfacprune.export.console import captured_console
from tf_kfacprune.export.samples import Named, named_examples, random_examples
from tf_kfacprune.export.saved_models import write_served
from tf_kfacprune.export.serving import SIGNATURE, Signature, check_exportable, layers_within
from tf_kfacprune.export.verification import (
    ONLY_INPUT,
    compare_outputs,
    compute_tolerance,
    finite_reference,
    run_litert,
)

__all__ = ["FULL_INTEGER", "QUANTIZATIONS", "convert", "run_tflite", "tflite"]

QUANTIZATIONS = (None, "float16", "dynamic", "int8", "int16x8")
FULL_INTEGER = ("int8", "int16x8")
_IO_TYPES = {"int8": ("int8", "uint8", "float32"), "int16x8": ("int16", "float32")}


def tflite(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    representative_data: Any = None,
    io_dtype: str | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    verify_data: Any = None,
    tolerance: float | None = None,
) -> Path:
    """Writes a ``.tflite`` file of built-in operations and proves that it is the same network.

    Args:
        model: a built Sequential or Functional model without gates (see `compact`).
        path: the file to write. It appears whole or not at all.
        quantization: None (float32), ``"float16"`` (weights), ``"dynamic"`` (int8 weights, float
            activations; tensors under 1,024 elements stay float), ``"int8"`` (int8 weights and
            activations) or ``"int16x8"`` (int8 weights, int16 activations).
        representative_data: real inputs, for ``"int8"`` and ``"int16x8"`` only: the range of every
            activation is measured on them (the first 256 examples). An array, a list or
            dictionary of arrays, or an iterable of batches such as a ``tf.data.Dataset``.
        io_dtype: dtype of the inputs and outputs of a fully quantized file: ``"int8"`` (default
            for ``"int8"``), ``"uint8"``, ``"int16"`` (default for ``"int16x8"``) or ``"float32"``.
        batch_size: the only batch size the file runs; None runs any, at the price of some shape
            arithmetic in the file.
        overwrite: replace an existing file.
        verify: run the written file with LiteRT in a process without TensorFlow, and compare its
            outputs with the model's.
        verify_data: inputs to compare on, given like ``representative_data``. By default the
            representative data, else random inputs.
        tolerance: largest relative error allowed; by default that of the format (1e-4 for float32,
            1e-2 for float16, 0.1 to 0.2 root mean square for integers).

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: if an option is unknown or does not go with another.
        UnsupportedModelError: if the model has gates, symbolic inputs are missing, or the
            converter is known to crash on it.
        DataError: if the data do not fit the model.
        ExportError: if the path exists or cannot be written, the converter fails, or the written
            file does not agree with the model; nothing is left behind then.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", section 2.1.

    Example:
        >>> import keras, tf_kfacprune as kp
        >>> net = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(2)])
        >>> kp.export.tflite(net, "net.tflite", quantization="float16")  # doctest: +SKIP
        PosixPath('net.tflite')
    """
    check_exportable(model, batch_size)
    _check_options(quantization, representative_data, io_dtype, tolerance)
    _refuse_rolled_recurrence(model, quantization, batch_size)
    signature = Signature.of(model, batch_size)
    representative = None
    if representative_data is not None:
        representative = named_examples(representative_data, signature, "representative_data")
    inputs = None
    if verify:
        if verify_data is not None:
            inputs = named_examples(verify_data, signature, "verify_data")
        else:
            inputs = representative or random_examples(signature)
    with atomic_file(path, overwrite=overwrite) as partial:
        partial.write_bytes(
            convert(
                model, signature, quantization, representative=representative, io_dtype=io_dtype
            )
        )
        if inputs is not None:
            allowed = compute_tolerance(model, quantization) if tolerance is None else tolerance
            what = f"The file for {path}"
            compare_outputs(
                finite_reference(model, signature, inputs),
                run_litert(partial, inputs, what=what),
                tolerance=allowed,
                quantization=quantization,
                what=what,
            )
    return Path(path)


def run_tflite(
    path: str | os.PathLike[str], inputs: np.ndarray | Named, *, threads: int = 1
) -> np.ndarray | Named:
    """Runs a ``.tflite`` file with LiteRT, in a process where TensorFlow is never imported.

    Quantized inputs and outputs are converted from and to real values.

    Args:
        path: a file with one signature named ``serving_default``, as `tflite` writes.
        inputs: array of examples, shape ``(n, ...)``, if the file has one input; else arrays by
            input name.
        threads: number of threads.

    Returns:
        The output array, shape ``(n, ...)``; arrays by name if there are several outputs, or if
        ``inputs`` was a dictionary.

    Raises:
        ExportError: if LiteRT is not installed, or cannot load or run the file.

    Example:
        >>> import tf_kfacprune as kp
        >>> logits = kp.export.run_tflite("net.tflite", x)  # doctest: +SKIP
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"{file}: no such file. Write it with tf_kfacprune.export.tflite.")
    named = inputs if isinstance(inputs, dict) else {ONLY_INPUT: np.asarray(inputs)}
    outputs = run_litert(file, named, threads=threads)
    if isinstance(inputs, dict) or len(outputs) > 1:
        return outputs
    return next(iter(outputs.values()))


def convert(
    model: keras.Model,
    signature: Signature,
    quantization: str | None = None,
    *,
    representative: Named | None = None,
    io_dtype: str | None = None,
) -> bytes:
    """The content of a ``.tflite`` file, unverified.

    The route goes over a SavedModel: converting a Keras 3 model's concrete function directly
    silently writes a file without weights.

    Raises:
        ExportError: with the converter's log, if it fails.
    """
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_served(model, signature, folder)
        try:
            with captured_console() as log, warnings.catch_warnings():
                # Calibration warns that the interpreter it uses itself is deprecated.
                warnings.simplefilter("ignore")
                converter = tf.lite.TFLiteConverter.from_saved_model(temporary)
                _configure(converter, quantization, representative, io_dtype)
                content = converter.convert()
        # The converter raises its own class, plain Exception and others for one kind of trouble.
        except Exception as error:
            raise ExportError(
                f"The TFLite converter cannot convert model {model.name!r}"
                + (f" with quantization={quantization!r}" if quantization else "")
                + f": {_first_line(error)}\nIts log ends with:\n{log.tail}"
            ) from error
    return content


def _configure(
    converter: Any, quantization: str | None, representative: Named | None, io_dtype: str | None
) -> None:
    import tensorflow as tf

    if quantization is None:
        return
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantization not in FULL_INTEGER or representative is None:
        return
    converter.representative_dataset = lambda: _calibration(representative)
    operations = tf.lite.OpsSet.TFLITE_BUILTINS_INT8
    if quantization == "int16x8":
        operations = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    converter.target_spec.supported_ops = [operations]
    dtype = tf.as_dtype(io_dtype or _IO_TYPES[quantization][0])
    converter.inference_input_type = dtype
    converter.inference_output_type = dtype


def _calibration(representative: Named) -> Iterator[tuple[str, Named]]:
    """One example at a time, by signature: unnamed lists are not kept in the model's order."""
    count = len(next(iter(representative.values())))
    for i in range(count):
        yield SIGNATURE, {name: values[i : i + 1] for name, values in representative.items()}


def _check_options(
    quantization: str | None, representative_data: Any, io_dtype: str | None, tolerance: Any
) -> None:
    if quantization == "qat":
        raise InvalidArgumentError(
            "quantization='qat' (quantization-aware training) is not available in this version. "
            "Use 'int8' with representative_data."
        )
    if quantization not in QUANTIZATIONS:
        raise InvalidArgumentError(
            f"quantization must be one of {QUANTIZATIONS}. Received: quantization={quantization!r}."
        )
    if quantization in FULL_INTEGER and representative_data is None:
        raise InvalidArgumentError(
            f"quantization={quantization!r} needs representative_data: real inputs on which the "
            "range of every activation is measured. Pass some hundred training inputs."
        )
    if quantization not in FULL_INTEGER and representative_data is not None:
        raise InvalidArgumentError(
            f"representative_data is used by {FULL_INTEGER} only. Received: "
            f"quantization={quantization!r}. Leave it out; inputs to verify on are verify_data."
        )
    allowed = _IO_TYPES.get(quantization or "", ("float32",))
    if io_dtype is not None and io_dtype not in allowed:
        raise InvalidArgumentError(
            f"io_dtype must be one of {allowed} with quantization={quantization!r}. Received: "
            f"io_dtype={io_dtype!r}."
        )
    if tolerance is not None and not (
        isinstance(tolerance, int | float) and 0 < tolerance < float("inf")
    ):
        raise InvalidArgumentError(
            f"tolerance must be a positive number. Received: tolerance={tolerance!r}."
        )


def _refuse_rolled_recurrence(
    model: keras.Model, quantization: str | None, batch_size: int | None
) -> None:
    """Recurrent loops: they crash full integer conversion, and others need a fixed batch."""
    for layer in layers_within(model):
        if not isinstance(layer, keras.layers.RNN) or layer.unroll:
            continue
        where = f"Layer {layer.name!r} ({type(layer).__name__})"
        if quantization in FULL_INTEGER:
            raise UnsupportedModelError(
                f"{where} cannot be converted with quantization={quantization!r}: the converter "
                "crashes on rolled recurrent layers. Build the layer with unroll=True, or use "
                "'dynamic' with batch_size=1."
            )
        if batch_size is None:
            raise InvalidArgumentError(
                f"{where} needs a fixed batch size: there is no built-in operation for a "
                "recurrent loop over a batch of any size. Pass batch_size=1, or build the layer "
                "with unroll=True."
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
