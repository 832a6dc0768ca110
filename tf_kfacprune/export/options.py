"""Which options of an export go together, and the models that a format refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export.serving import layers_within
from tf_kfacprune.export.text import TEXT
from tf_kfacprune.validation import is_number_in

__all__ = [
    "FULL_INTEGER",
    "IO_TYPES",
    "QUANTIZATIONS",
    "check_drop",
    "check_options",
    "check_verifiable",
    "refuse_rolled_recurrence",
    "refuse_text",
]

QUANTIZATIONS = (None, "float16", "dynamic", "weight_only", "int4", "int8", "int16x8", "qat")
FULL_INTEGER = ("int8", "int16x8")
IO_TYPES = {
    "int8": ("int8", "uint8", "float32"),
    "int16x8": ("int16", "float32"),
    "qat": ("int8", "uint8", "float32"),
}


def check_options(
    quantization: str | None, representative_data: Any, io_dtype: str | None, tolerance: Any
) -> None:
    """Refuses options that are unknown or do not go together.

    Raises:
        InvalidArgumentError: with the option, what it was and what it may be.
    """
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
    allowed = IO_TYPES.get(quantization or "", ("float32",))
    if io_dtype is not None and io_dtype not in allowed:
        raise InvalidArgumentError(
            f"io_dtype must be one of {allowed} with quantization={quantization!r}. Received: "
            f"io_dtype={io_dtype!r}."
        )
    if tolerance is not None and not is_number_in(tolerance, "(0, inf)"):
        raise InvalidArgumentError(
            f"tolerance must be a positive number. Received: tolerance={tolerance!r}."
        )


def refuse_rolled_recurrence(
    model: keras.Model, quantization: str | None, batch_size: int | None
) -> None:
    """Recurrent loops: they crash full integer conversion, and others need a fixed batch.

    Raises:
        UnsupportedModelError: if the converter would crash.
        InvalidArgumentError: if a batch size is needed.
    """
    for layer in layers_within(model):
        if not isinstance(layer, keras.layers.RNN) or layer.unroll:
            continue
        where = f"Layer {layer.name!r} ({type(layer).__name__})"
        if quantization in FULL_INTEGER:
            raise UnsupportedModelError(
                f"{where} cannot be converted with quantization={quantization!r}: the converter "
                "crashes on rolled recurrent layers. Build the network anew with unroll=True in "
                "this layer, give it the weights (new.set_weights(old.get_weights())) and export "
                "that; or use 'dynamic' with batch_size=1."
            )
        if batch_size is None:
            raise InvalidArgumentError(
                f"{where} needs a fixed batch size: there is no built-in operation for a "
                "recurrent loop over a batch of any size. Pass batch_size=1, or build the network "
                "anew with unroll=True in this layer and the same weights."
            )


def refuse_text(model: keras.Model, dtypes: Mapping[str, str]) -> None:
    """Text, for which a ``.tflite`` file has no built-in operations.

    Args:
        model: the model.
        dtypes: element types of inputs or outputs, by what messages call them.

    Raises:
        UnsupportedModelError: with the input or output, and what works instead.
    """
    for where, dtype in dtypes.items():
        if dtype == TEXT:
            raise UnsupportedModelError(
                f"Model {model.name!r} has text (dtype string) at {where}, and a .tflite file has "
                "no built-in operations for text. Export the whole model with "
                "kp.export.saved_model. Or export its part without text, keras.Model(numbers, "
                "outputs) behind the layer that turns text into numbers, and let the program on "
                "the device do the work of that layer."
            )


def check_verifiable(select_ops: bool, verify: bool) -> None:
    """Refuses to verify what no interpreter for Python can run.

    Raises:
        InvalidArgumentError: if a file with operations of TensorFlow is to be verified.
    """
    if select_ops and verify:
        raise InvalidArgumentError(
            "A file with select_ops=True cannot be verified: neither LiteRT nor TensorFlow 2.21 "
            "has an interpreter for Python with these operations. Pass verify=False and run it on "
            "the device, or leave select_ops out."
        )


def check_drop(max_accuracy_drop: float) -> None:
    """Refuses a drop of accuracy that is no fraction.

    Raises:
        InvalidArgumentError: if it is not in [0, 1].
    """
    if not is_number_in(max_accuracy_drop, "[0, 1]"):
        raise InvalidArgumentError(
            "max_accuracy_drop must be a number in [0, 1], such as 0.01 for one point. Received: "
            f"max_accuracy_drop={max_accuracy_drop!r}."
        )
