"""`kfacprune export`: a SavedModel, a `.tflite` file or a C header, verified."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from absl import flags

from tf_kfacprune.cli.command import Command, FileError, UsageError, define_count, define_number
from tf_kfacprune.cli.models import fitted_inputs, model_of
from tf_kfacprune.cli.shared import (
    add_data_flags,
    add_output_flags,
    load_data,
    refuse_inputs_as_outputs,
)
from tf_kfacprune.data import Dataset
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.export import Metadata, c_array, saved_model, tflite, with_head
from tf_kfacprune.export.c_header import check_name
from tf_kfacprune.export.options import FULL_INTEGER

__all__ = ["command"]

_FORMATS = ("tflite", "saved_model", "c_array")
_HEADS = ("none", "softmax", "argmax")
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
    flags.DEFINE_enum(
        "format",
        "tflite",
        _FORMATS,
        "What to write; c_array is a .tflite file in a C header, for microcontrollers.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "quantization",
        None,
        "For tflite and c_array: float16, dynamic, weight_only, int4, or int8 or int16x8 (which "
        "need --data).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "io_dtype",
        None,
        "Inputs and outputs with int8: int8, uint8 or float32; with int16x8: int16 or float32.",
        flag_values=values,
    )
    define_count(
        values, "batch_size", None, "The only batch size; by default 1 for c_array, else any."
    )
    flags.DEFINE_string(
        "name",
        None,
        'For c_array: C identifier of the array, "model" by default; all names in the header and '
        "its include guard begin with it.",
        flag_values=values,
    )
    add_data_flags(values, default=None)
    _define_surroundings(values)
    flags.DEFINE_bool("verify", True, "Run what was written and compare.", flag_values=values)
    define_number(
        values,
        "max_accuracy_drop",
        0.01,
        "How much lower its accuracy on the test set may be, as a fraction.",
    )
    add_output_flags(values, "output", "Path of the file (tflite, c_array) or folder.")


def _define_surroundings(values: flags.FlagValues) -> None:
    """Flags of what goes around the network, and of what the file says about it."""
    flags.DEFINE_enum(
        "head", "none", _HEADS, "Put this behind the network's output.", flag_values=values
    )
    define_number(values, "scale", 1.0, "Multiply raw inputs by this, inside the exported model.")
    define_number(values, "offset", 0.0, "Add this after scaling.")
    flags.DEFINE_list(
        "labels",
        [],
        "Names of the classes, comma-separated, for the metadata; those of --data by default.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "record",
        None,
        "record.json of the training run: its budget and kept neurons go into the metadata.",
        flag_values=values,
    )


def _execute(values: flags.FlagValues) -> None:
    _refuse_useless_flags(values)
    if values.quantization in FULL_INTEGER and not values.data:
        raise UsageError(
            f"--quantization={values.quantization} needs --data: real inputs, on which the range "
            "of every activation is measured."
        )
    refuse_inputs_as_outputs(values, "output", "model", "data", "record")
    network = model_of(values.model, "export")
    head = None if values.head == "none" else values.head
    model = network
    if head or _scales(values):
        model = with_head(network, head, scale=values.scale, offset=values.offset)
    examples = representative = None
    dataset = load_data(values) if values.data else None
    if dataset is not None:
        examples = _raw(values, fitted_inputs(network, dataset.x_test))
        if dataset.kind == "classes":
            examples = (examples, dataset.y_test)
        if values.quantization in FULL_INTEGER:
            x_train = fitted_inputs(network, dataset.x_train)[:_REPRESENTATIVE_EXAMPLES]
            representative = _raw(values, x_train)
    options: dict[str, Any] = {
        "batch_size": _batch_size(values, network),
        "verify": values.verify,
        "verify_data": examples,
        "max_accuracy_drop": values.max_accuracy_drop,
    }
    if values.format == "saved_model":
        path = saved_model(model, values.output, overwrite=values.overwrite, **options)
    else:
        options |= {
            "quantization": values.quantization,
            "representative_data": representative,
            "io_dtype": values.io_dtype,
            "metadata": _metadata(values, dataset, network),
        }
        path = _write(model, values, options)
    print(f"Wrote {path}" + (f", verified against {values.model}" if values.verify else ""))


def _write(model: keras.Model, values: flags.FlagValues, options: dict[str, Any]) -> Path:
    """Writes the `.tflite` file, or a header with it."""
    if values.format == "tflite":
        return tflite(model, values.output, overwrite=values.overwrite, **options)
    with tempfile.TemporaryDirectory() as folder:
        file = tflite(model, Path(folder) / "model.tflite", **options)
        return c_array(file, values.output, name=_array_name(values), overwrite=values.overwrite)


def _array_name(values: flags.FlagValues) -> str:
    return "model" if values.name is None else str(values.name)


def _batch_size(values: flags.FlagValues, model: keras.Model) -> int | None:
    """The batch size asked for; a microcontroller looks at one example at a time."""
    if values.batch_size is None and values.format == "c_array":
        inputs = getattr(model, "inputs", None)
        return (inputs[0].shape[0] if inputs else None) or 1
    return values.batch_size


def _raw(values: flags.FlagValues, x: Any) -> Any:
    """Inputs as they are before the scaling that the exported model does itself."""
    return (x - values.offset) / values.scale if _scales(values) else x


def _scales(values: flags.FlagValues) -> bool:
    """Whether the exported model scales its inputs itself."""
    return (values.scale, values.offset) != (1.0, 0.0)


def _metadata(
    values: flags.FlagValues, dataset: Dataset | None, network: keras.Model
) -> Metadata | None:
    """What the file says; what the flags leave out is taken from the data set."""
    if not values.labels and not values.record:
        return None
    labels, scale = values.labels, 1.0
    if dataset is not None:
        labels = labels or dataset.labels
        scale = 1.0 if _scales(values) else dataset.scale
    _check_labels(labels, network)
    if not values.record:
        return Metadata(labels, scale)
    try:
        record = json.loads(Path(values.record).read_text())
        return Metadata.of_record(record, labels=labels, scale=scale)
    except (
        *(OSError, ValueError, TypeError, AttributeError, InvalidArgumentError),
        RecursionError,  # of JSON that is nested too deeply
    ) as error:
        raise FileError(
            "--record must be the record.json of a training run. Received: "
            f"--record={values.record} ({type(error).__name__}: {error})"
        ) from error


def _check_labels(labels: Sequence[str], network: keras.Model) -> None:
    """There is a name for every class; a single output decides between two."""
    outputs = network.outputs[0].shape[-1] if len(network.outputs) == 1 else None
    classes = 2 if outputs == 1 else outputs
    if labels and classes is not None and len(labels) != classes:
        raise UsageError(
            f"--labels must name every class of the model once: it has {classes}. Received: "
            f"{len(labels)} names, {', '.join(labels[:10])}"
        )
    twice = [name for k, name in enumerate(labels) if not name.strip() or name in labels[:k]]
    if twice:
        raise UsageError(
            "--labels must be different names, none of them empty. Received: "
            f"--labels={','.join(labels)}, with {twice[0]!r} in it."
        )


def _refuse_useless_flags(values: flags.FlagValues) -> None:
    """A SavedModel keeps its weights as they are, and has no place for metadata or a C name."""
    if values.format == "c_array":
        check_name(_array_name(values))
    elif values.name is not None:
        raise InvalidArgumentError(
            f"--name is for --format=c_array only. Received: --name={values.name} "
            f"--format={values.format}"
        )
    if values.format != "saved_model":
        return
    for name in ("quantization", "io_dtype", "labels", "record"):
        if given := getattr(values, name):
            raise UsageError(
                f"--{name} is for --format=tflite and c_array only. Received: --{name}={given} "
                f"--format={values.format}"
            )
