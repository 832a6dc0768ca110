"""`kfacprune export`: a SavedModel or a `.tflite` file, verified."""

from __future__ import annotations

from absl import flags

from tf_kfacprune.cli.command import Command
from tf_kfacprune.cli.shared import (
    add_data_flags,
    add_output_flags,
    fitted_inputs,
    load_data,
    model_of,
)
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.export import saved_model, tflite

__all__ = ["command"]

_FORMATS = ("tflite", "saved_model")
_VERIFIED_EXAMPLES = 256
_REPRESENTATIVE_EXAMPLES = 500


def command() -> Command:
    """The command, with flags of its own."""
    return Command(
        "export", "Write a compact model as a SavedModel or .tflite file.", _define, _execute
    )


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        None,
        "Path of the .keras file of a model without gates.",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_enum("format", "tflite", _FORMATS, "What to write.", flag_values=values)
    flags.DEFINE_string(
        "quantization",
        None,
        "For tflite: float16, dynamic, or int8 (which needs --data).",
        flag_values=values,
    )
    add_data_flags(values, default=None)
    add_output_flags(values, "output", "Path of the file (tflite) or folder (saved_model).")


def _execute(values: flags.FlagValues) -> None:
    model = model_of(values.model, "export")
    examples = representative = None
    if values.data:
        dataset = load_data(values)
        examples = fitted_inputs(model, dataset.x_test)[:_VERIFIED_EXAMPLES]
        if values.quantization == "int8":
            representative = fitted_inputs(model, dataset.x_train)[:_REPRESENTATIVE_EXAMPLES]
    if values.format == "tflite":
        path = tflite(
            model,
            values.output,
            quantization=values.quantization,
            representative_data=representative,
            overwrite=values.overwrite,
            verify_data=examples,
        )
    elif values.quantization:
        raise InvalidArgumentError(
            "--quantization is for --format=tflite; a SavedModel keeps its weights as they are. "
            f"Received: --quantization={values.quantization} --format={values.format}"
        )
    else:
        path = saved_model(model, values.output, overwrite=values.overwrite, verify_data=examples)
    print(f"Wrote {path}, verified against {values.model}")
