"""Writes a .tflite file and proves that LiteRT computes the same network with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.atomic import atomic_file
from tf_kfacprune.export.console import log_kept_on_error
from tf_kfacprune.export.conversion import convert
from tf_kfacprune.export.half_precision import float32_twin
from tf_kfacprune.export.memory_plan import with_memory_plan
from tf_kfacprune.export.metadata import Metadata, with_metadata
from tf_kfacprune.export.options import (
    check_drop,
    check_options,
    check_verifiable,
    refuse_rolled_recurrence,
    refuse_text,
)
from tf_kfacprune.export.ports import ports_of
from tf_kfacprune.export.running import ONLY_INPUT, run_litert
from tf_kfacprune.export.samples import (
    Examples,
    Named,
    labelled_examples,
    named_examples,
    random_examples,
)
from tf_kfacprune.export.serving import Signature, check_exportable
from tf_kfacprune.export.verification import (
    compare_outputs,
    compute_tolerance,
    finite_reference,
    verify_outputs,
)

__all__ = ["run_tflite", "tflite"]


def tflite(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    representative_data: Any = None,
    io_dtype: str | None = None,
    batch_size: int | None = None,
    select_ops: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    verify_data: Any = None,
    tolerance: float | None = None,
    max_accuracy_drop: float = 0.01,
    metadata: Metadata | None = None,
) -> Path:
    """Writes a ``.tflite`` file of built-in operations and proves that it is the same network.

    A network in half precision (``mixed_float16``, ``mixed_bfloat16``) is written through its
    float32 twin, a copy with the same weights. The twin is held to the network within 20 rounding
    units of its dtype (0.01 for float16, 0.08 for bfloat16), the file to the twin.

    Args:
        model: a built Sequential or Functional model without gates (see `compact`).
        path: the file to write. It appears whole or not at all.
        quantization: None (float32), ``"float16"`` (weights), ``"dynamic"`` (int8 weights, float
            activations; tensors under 1,024 elements stay float), ``"weight_only"`` (int8 weights,
            float arithmetic), ``"int4"`` (int4 weights, float activations), ``"int8"`` (int8
            weights and activations), ``"int16x8"`` (int8 weights, int16 activations) or ``"qat"``
            (int8, of the trained result of `tf_kfacprune.tfmot.quantize_aware`, which learned the
            ranges). ``"weight_only"`` and ``"int4"`` need the extra ``[quantizer]``.
        representative_data: real inputs, for ``"int8"`` and ``"int16x8"`` only: the range of every
            activation is measured on them (the first 256 examples). An array, a list or
            dictionary of arrays, an iterable of batches such as a ``tf.data.Dataset``, or a
            function that returns one.
        io_dtype: dtype of the inputs and outputs of a fully quantized file: ``"int8"`` (default
            for ``"int8"``), ``"uint8"``, ``"int16"`` (default for ``"int16x8"``) or ``"float32"``.
        batch_size: the only batch size the file runs; None runs any, at the price of some shape
            arithmetic in the file. With 1 the file says where TensorFlow Lite Micro is to put its
            activations, if that saves memory there.
        select_ops: allow operations for which there is only TensorFlow's kernel ("select ops").
            Such a file runs where the program links them in. No interpreter for Python does, so
            that it cannot be verified: pass ``verify=False`` too.
        overwrite: replace an existing file.
        verify: run the written file with LiteRT in a process without TensorFlow, and compare its
            outputs with the model's.
        verify_data: inputs to compare on, given like ``representative_data``. By default the
            representative data, else random inputs. With labels, ``(x, y)``, accuracies are
            compared too, on up to 10,000 examples.
        tolerance: largest relative error allowed; by default that of the format (1e-4 for float32,
            1e-2 for float16, 0.1 to 0.2 root mean square for integers).
        max_accuracy_drop: how much lower the accuracy of the file may be than that of the model,
            in [0, 1]; one example may always change sides.
        metadata: labels, input scaling and pruning record to put into the file, for
            `read_metadata`; added to them is which input and output of the file is which of the
            model.

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: if an option is unknown or does not go with another.
        UnsupportedModelError: if the model has gates, takes or returns text, symbolic inputs are
            missing, or the converter is known to crash on it.
        DataError: if the data do not fit the model.
        ExportError: if the path exists or cannot be written, the converter fails, or the written
            file does not agree with the model; nothing is left behind then, and the message names
            the log.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", section 2.1.

    Examples:
        >>> import keras, tf_kfacprune as kp
        >>> net = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(2)])
        >>> kp.export.tflite(net, "net.tflite", quantization="float16")  # doctest: +SKIP
        PosixPath('net.tflite')
    """
    check_exportable(model, batch_size, legacy=quantization == "qat")
    check_options(quantization, representative_data, io_dtype, tolerance)
    check_drop(max_accuracy_drop)
    check_verifiable(select_ops, verify)
    refuse_rolled_recurrence(model, quantization, batch_size)
    signature = Signature.of(model, batch_size).in_float32()
    refuse_text(model, signature.input_dtypes)
    twin = float32_twin(model)
    representative = None
    if representative_data is not None:
        representative = named_examples(representative_data, signature, "representative_data")
        finite_reference(twin, signature, representative)  # the converter would crash the process
    examples = None
    if verify:
        if verify_data is not None:
            examples = labelled_examples(verify_data, signature, "verify_data")
        else:
            examples = Examples(representative or random_examples(signature))
    with log_kept_on_error(path) as log, atomic_file(path, overwrite=overwrite) as partial:
        content = convert(
            twin,
            signature,
            quantization,
            representative=representative,
            io_dtype=io_dtype,
            select_ops=select_ops,
            log=log,
        )
        if batch_size == 1:
            content = with_memory_plan(content)
        if metadata is not None:
            content = with_metadata(content, metadata, ports_of(model, signature, content))
        partial.write_bytes(content)
        if examples is not None:
            allowed = compute_tolerance(twin, quantization) if tolerance is None else tolerance
            what = f"The file for {path}"
            reference = trained = finite_reference(model, signature, examples.inputs)
            if twin is not model:
                reference = finite_reference(twin, signature, examples.inputs)
                compare_outputs(
                    trained,
                    reference,
                    tolerance=max(compute_tolerance(model), tolerance or 0.0),
                    quantization=None,
                    what=f"The float32 twin of {model.name!r}",
                )
            verify_outputs(
                reference,
                run_litert(partial, examples.inputs, what=what),
                examples,
                tolerance=allowed,
                quantization=quantization,
                max_accuracy_drop=max_accuracy_drop,
                what=what,
                trained=trained,
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

    Examples:
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
