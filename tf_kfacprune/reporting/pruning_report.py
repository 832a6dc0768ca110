"""One call from the two models to the before/after comparison."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.callbacks.pruning_state import settings_of
from tf_kfacprune.compaction import compaction_report
from tf_kfacprune.curvature.data_passes import gathered
from tf_kfacprune.errors import ExportError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export.atomic import atomic_file
from tf_kfacprune.export.file_sizes import FileSize
from tf_kfacprune.export.timing import latency
from tf_kfacprune.reporting.comparison import Comparison
from tf_kfacprune.reporting.figures import ModelFigures, flatness_of, measures, tflite_size
from tf_kfacprune.reporting.records import command_line, versions
from tf_kfacprune.reporting.report_page import report_page
from tf_kfacprune.reporting.run_history import run_of

__all__ = ["report"]


def report(
    model: Any,
    compact_model: keras.Model,
    *,
    dense: keras.Model | None = None,
    data: Sequence[Any] | tf.data.Dataset | None = None,
    files: bool = True,
    time: bool = True,
    flatness: Any = None,
    html: str | os.PathLike[str] | None = None,
    history: keras.callbacks.History | None = None,
    overwrite: bool = False,
) -> Comparison:
    """Compares a compact model with the network it came from.

    Args:
        model: what `compact` was given (a `PrunableModel` or a gated model), in the same state.
        compact_model: what it returned.
        dense: the network without gates, trained without pruning, as the other side of accuracy,
            file size and latency. Without it these show the compact model only.
        data: ``(x, y)`` to measure accuracy on, arrays or a `tf.data.Dataset` of batches; none is
            measured without it. Of a model that is no classifier of class numbers (regression,
            binary decisions, several outputs, pixels) the loss and the metrics are shown that it
            was compiled with, or else ``model``.
        files: convert both to float32 ``.tflite`` and compare the bytes. A model for which that is
            impossible is warned of, and has none in the table.
        time: compare the latencies, if ``dense`` is given.
        flatness: a loss, as given to ``compile``, to compute the top eigenvalue of the Hessian
            with, on the first 500 examples of ``data``; none is computed without it.
        html: path of a page to write: bars of what was kept, curves of the run, and all tables, in
            one ``.html`` file that needs no network.
        history: what ``fit`` returned, for the curves of the page; by default that of the last
            ``fit`` of ``model`` in this process.
        overwrite: replace an existing page.

    Returns:
        A comparison that prints as a table.

    Raises:
        DataError: if ``data`` is a dataset without an end, or not of pairs.
        InvalidArgumentError: if the models do not belong together, ``data`` is not a pair, is
            missing for ``flatness``, or is given for a model that is neither a classifier nor
            compiled, or ``history`` or the name of the page is something else.
        ExportError: if a model cannot be timed, or the page exists or cannot be written.

    Examples:
        >>> import tf_kfacprune as kp
        >>> print(kp.report(pm, kp.compact(pm), data=(x_test, y_test)))  # doctest: +SKIP
        >>> kp.report(pm, kp.compact(pm), html="report.html")  # doctest: +SKIP
    """
    if isinstance(data, tf.data.Dataset):
        data = gathered(data)
    if data is not None and (not isinstance(data, tuple | list) or len(data) != 2):
        size = f" of {len(data)}" if isinstance(data, tuple | list) else ""
        raise InvalidArgumentError(
            "data must be a pair (x, y) of arrays, or a tf.data.Dataset of batches (x, y); weights "
            "of examples are not taken. Received: "
            f"{type(data).__name__}{size}."
        )
    if flatness is not None and data is None:
        raise InvalidArgumentError("flatness needs data=(x, y) to be measured on.")
    run = run_of(model, history)
    if html is None:
        return _compared(model, compact_model, dense, data, files, time, flatness)
    if Path(html).suffix not in (".html", ".htm"):
        raise InvalidArgumentError(
            f"The name of a page must end in .html or .htm. Received: html={os.fspath(html)!r}."
        )
    # A page that may not be written is refused before anything is measured.
    with atomic_file(html, overwrite=overwrite) as partial:
        comparison = _compared(model, compact_model, dense, data, files, time, flatness)
        page = report_page(
            comparison,
            title=compact_model.name,
            run=run,
            settings=settings_of(model),
            command=command_line(),
            versions=versions(),
        )
        partial.write_text(page, encoding="utf-8")
    return comparison


def _compared(
    model: Any,
    compact_model: keras.Model,
    dense: keras.Model | None,
    data: Sequence[Any] | None,
    files: bool,
    time: bool,
    loss: Any,
) -> Comparison:
    removed = compaction_report(model, compact_model)
    timed = None
    if time and dense is not None:
        timed = latency({"dense": dense, "compact": compact_model})

    def figures(side: str, neurons: dict[str, int], net: keras.Model | None) -> ModelFigures:
        return ModelFigures(
            neurons=neurons,
            params=removed["params"][side],
            macs=removed["macs"][side],
            tflite=_tflite_size(net) if files and net is not None else None,
            **(
                measures(net, data[0], data[1], model)
                if data is not None and net is not None
                else {}
            ),
            flatness=(
                flatness_of(net, data[0], data[1], loss)
                if loss is not None and data is not None and net is not None
                else None
            ),
            latency_us=timed.microseconds[side] if timed is not None else None,
        )

    layers = removed["layers"]
    return Comparison(
        dense=figures("dense", {name: layer["channels"] for name, layer in layers.items()}, dense),
        compact=figures(
            "compact", {name: len(layer["kept"]) for name, layer in layers.items()}, compact_model
        ),
        latency_ratio=timed.ratios["compact"] if timed is not None else None,
        kept={name: layer["kept"] for name, layer in layers.items()},
        budget=model.budget_outcomes() if hasattr(model, "budget_outcomes") else {},
    )


def _tflite_size(net: keras.Model) -> FileSize | None:
    try:
        return tflite_size(net)
    except (ExportError, UnsupportedModelError) as error:
        warnings.warn(
            f"The report has no .tflite bytes of model {net.name!r} (files=False asks for none): "
            f"{str(error).splitlines()[0]}",
            stacklevel=4,
        )
        return None
