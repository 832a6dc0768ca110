"""One call from the two models to the before/after comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tf_kfacprune.compaction import compaction_report
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.export.timing import latency
from tf_kfacprune.reporting.comparison import Comparison
from tf_kfacprune.reporting.figures import ModelFigures, accuracy, tflite_size

__all__ = ["report"]


def report(
    model: Any,
    compact_model: keras.Model,
    *,
    dense: keras.Model | None = None,
    data: Sequence[Any] | None = None,
    files: bool = True,
    time: bool = True,
) -> Comparison:
    """Compares a compact model with the network it came from.

    Args:
        model: what `compact` was given (a `PrunableModel` or a gated model), in the same state.
        compact_model: what it returned.
        dense: the network without gates, trained without pruning, as the other side of accuracy,
            file size and latency. Without it these show the compact model only.
        data: ``(x, y)`` to measure accuracy on; none is measured without it.
        files: convert both to float32 ``.tflite`` and compare the bytes.
        time: compare the latencies, if ``dense`` is given.

    Returns:
        A comparison that prints as a table.

    Raises:
        InvalidArgumentError: if the models do not belong together or ``data`` is not a pair.
        ExportError: if a file cannot be converted or timed.

    Example:
        >>> import tf_kfacprune as kp
        >>> print(kp.report(pm, kp.compact(pm), data=(x_test, y_test)))  # doctest: +SKIP
    """
    if data is not None and (not isinstance(data, tuple | list) or len(data) != 2):
        raise InvalidArgumentError(f"data must be a pair (x, y). Received: {type(data).__name__}.")
    removed = compaction_report(model, compact_model)
    timed = None
    if time and dense is not None:
        timed = latency({"dense": dense, "compact": compact_model})

    def figures(side: str, neurons: dict[str, int], net: keras.Model | None) -> ModelFigures:
        return ModelFigures(
            neurons=neurons,
            params=removed["params"][side],
            macs=removed["macs"][side],
            tflite=tflite_size(net) if files and net is not None else None,
            accuracy=accuracy(net, *data) if data is not None and net is not None else None,
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
