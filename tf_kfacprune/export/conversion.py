"""From a Keras model to the content of a .tflite file, unverified."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.console import ConsoleLog, captured_console
from tf_kfacprune.export.half_precision import float32_twin
from tf_kfacprune.export.options import FULL_INTEGER, IO_TYPES, refuse_text
from tf_kfacprune.export.requantizing import RECIPES, requantized
from tf_kfacprune.export.runtime_forms import in_runtime_form
from tf_kfacprune.export.samples import Named
from tf_kfacprune.export.saved_models import write_served
from tf_kfacprune.export.serving import SIGNATURE, Signature

__all__ = ["convert"]


def convert(
    model: keras.Model,
    signature: Signature,
    quantization: str | None = None,
    *,
    representative: Named | None = None,
    io_dtype: str | None = None,
    select_ops: bool = False,
    log: ConsoleLog | None = None,
) -> bytes:
    """The content of a ``.tflite`` file, unverified.

    The route goes over a SavedModel: converting a Keras 3 model's concrete function directly
    silently writes a file without weights. A model in half precision is converted through its
    float32 twin.

    Raises:
        UnsupportedModelError: if the model takes or returns text, or has no float32 twin.
        ExportError: with the converter's log, if it fails.
    """
    import tensorflow as tf

    refuse_text(model, signature.input_dtypes)
    model, signature = float32_twin(model), signature.in_float32()
    log = ConsoleLog() if log is None else log
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with in_runtime_form(model):
            outputs = write_served(model, signature, folder, log)
        refuse_text(model, {f"output {name!r}": dtype for name, dtype in outputs.items()})
        try:
            with captured_console(log), warnings.catch_warnings():
                # Calibration warns that the interpreter it uses itself is deprecated.
                warnings.simplefilter("ignore")
                converter = tf.lite.TFLiteConverter.from_saved_model(temporary)
                _configure(converter, quantization, representative, io_dtype)
                if select_ops:
                    spec = converter.target_spec
                    spec.supported_ops = [*spec.supported_ops, tf.lite.OpsSet.SELECT_TF_OPS]
                content = converter.convert()
                if quantization is not None and quantization in RECIPES:
                    content = requantized(content, quantization)
        except ExportError:
            raise
        # The converter raises its own class, plain Exception and others for one kind of trouble.
        except Exception as error:
            raise ExportError(
                f"The TFLite converter cannot convert model {model.name!r}"
                + (f" with quantization={quantization!r}" if quantization else "")
                + f": {_first_line(error)}{_remedy(log.text)}\nIts log ends with:\n{log.tail}"
            ) from error
    return content


def _configure(
    converter: Any, quantization: str | None, representative: Named | None, io_dtype: str | None
) -> None:
    import tensorflow as tf

    if quantization is None or quantization in RECIPES:
        return
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantization not in IO_TYPES:
        return
    # Quantization-aware training has learned the ranges, and layers may stay float.
    if quantization in FULL_INTEGER and representative is not None:
        converter.representative_dataset = lambda: _calibration(representative)
        operations = tf.lite.OpsSet.TFLITE_BUILTINS_INT8
        if quantization == "int16x8":
            operations = tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        converter.target_spec.supported_ops = [operations]
    dtype = tf.as_dtype(io_dtype or IO_TYPES[quantization][0])
    converter.inference_input_type = dtype
    converter.inference_output_type = dtype


def _calibration(representative: Named) -> Iterator[tuple[str, Named]]:
    """One example at a time, by signature: unnamed lists are not kept in the model's order."""
    count = len(next(iter(representative.values())))
    for i in range(count):
        yield SIGNATURE, {name: values[i : i + 1] for name, values in representative.items()}


def _remedy(printed: str) -> str:
    """What helps where an operation has no built-in form; the log lists each with its types."""
    missing = re.findall(r"^\s*(tf\.\w+)\((.*)$", printed, re.MULTILINE)
    half = {operation for operation, types in missing if "f16>" in types}
    if half:
        return (
            f" {', '.join(sorted(half))} compute in float16 or bfloat16, for which there are no "
            "built-in operations: a layer or function of your own casts to it. Let it compute in "
            "the dtype of its input."
        )
    if "TF Select" not in printed:
        return ""
    return " If the device has TensorFlow's kernels, pass select_ops=True."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
