"""`kfacprune benchmark`: the dense and the compact model in every format, measured together."""

from __future__ import annotations

from typing import Any

from absl import flags

from tf_kfacprune.cli.command import Command, UsageError, define_count
from tf_kfacprune.cli.models import fitted_inputs, model_named, model_of
from tf_kfacprune.cli.shared import (
    add_data_flags,
    add_overwrite_flag,
    load_data,
    refuse_inputs_as_outputs,
)
from tf_kfacprune.export import benchmark
from tf_kfacprune.export.atomic import check_file
from tf_kfacprune.export.options import FULL_INTEGER
from tf_kfacprune.reporting import check_picture, plot_benchmark, versions, write_json_atomic

__all__ = ["command"]

_FLOAT32 = "float32"
_FORMATS = (_FLOAT32, "float16", "dynamic", "weight_only", "int4", "int8", "int16x8")
# More would take days, or more threads than a system gives.
_MOST_BLOCKS, _MOST_THREADS = 1_000_000, 1024


def command() -> Command:
    """The command, with flags of its own."""
    return Command(
        "benchmark", "Measure bytes, latency and memory of models in every format.", _define, _run
    )


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "dense",
        None,
        "The reference: the path of a .keras file, or a built-in network (which is not trained).",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_string(
        "model",
        None,
        "Path of the .keras file of the compact model.",
        flag_values=values,
        required=True,
    )
    flags.DEFINE_list(
        "formats",
        [_FLOAT32, "float16", "dynamic"],
        f"What to measure, comma-separated: {', '.join(_FORMATS)}. The integer formats int8 and "
        "int16x8 need --data.",
        flag_values=values,
    )
    flags.DEFINE_list("threads", ["1"], "Numbers of threads, comma-separated.", flag_values=values)
    define_count(
        values, "blocks", 30, "Interleaved blocks of the time measurement.", upper=_MOST_BLOCKS
    )
    add_data_flags(values, default=None)
    flags.DEFINE_string("json", None, "Write the figures to this file.", flag_values=values)
    flags.DEFINE_string(
        "plot", None, "Draw them into this .png, .svg or .pdf file.", flag_values=values
    )
    add_overwrite_flag(values)


def _run(values: flags.FlagValues) -> None:
    for output in ("json", "plot"):
        refuse_inputs_as_outputs(values, output, "model", "dense", "data")
        if values[output].value:  # before the measurement, which takes minutes
            check_file(values[output].value, overwrite=values.overwrite)
    if values.plot:
        check_picture(values.plot)
    formats = _formats(values.formats)
    threads = [_positive(text) for text in values.threads]
    dataset = load_data(values) if values.data else None
    models = {
        "dense": model_named(values.dense, dataset, flag="dense"),
        "compact": model_of(values.model, "benchmark"),
    }
    _refuse_unrelated(values, models)
    data = representative = None
    if dataset is not None:
        if dataset.kind == "classes":
            data = (fitted_inputs(models["compact"], dataset.x_test), dataset.y_test)
        if set(formats) & set(FULL_INTEGER):
            representative = fitted_inputs(models["compact"], dataset.x_train)
    measured = benchmark(
        models,
        quantizations=formats,
        representative_data=representative,
        data=data,
        threads=threads,
        blocks=values.blocks,
    )
    print(measured)
    if values.json:
        content = measured.to_dict() | {"versions": versions(), "data": values.data}
        write_json_atomic(values.json, content, overwrite=values.overwrite)
    if values.plot:
        plot_benchmark(measured, values.plot, overwrite=values.overwrite)


def _refuse_unrelated(values: flags.FlagValues, models: dict[str, Any]) -> None:
    """Models that take or return something else cannot do the same work."""
    shapes = {
        name: (
            [tuple(tensor.shape) for tensor in model.inputs],
            [tuple(tensor.shape) for tensor in model.outputs],
        )
        for name, model in models.items()
        if hasattr(model, "inputs") and hasattr(model, "outputs")
    }
    for k, what in enumerate(("takes", "returns")):
        found = {name: sides[k] for name, sides in shapes.items()}
        if len(found) == 2 and found["dense"] != found["compact"]:
            raise UsageError(
                f"--dense={values.dense} {what} {found['dense']} and --model={values.model} "
                f"{what} {found['compact']}: two models that do different work cannot be compared."
            )


def _formats(given: list[str]) -> list[str | None]:
    unknown = [name for name in given if name not in _FORMATS]
    if unknown or not given:
        raise UsageError(
            f"--formats must be some of {', '.join(_FORMATS)}. Received: "
            f"--formats={','.join(given)}"
        )
    return [None if name == _FLOAT32 else name for name in given]


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 4 or not 1 <= int(text) <= _MOST_THREADS:
        raise UsageError(
            f"--threads must be integers from 1 to {_MOST_THREADS}, comma-separated. Received: "
            f"{text!r}"
        )
    return int(text)
