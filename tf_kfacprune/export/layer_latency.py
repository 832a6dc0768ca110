"""Measures how long each layer of a model takes on this machine, for budgets of latency.

Every distinct layer with weights is converted on its own, at several numbers of input and output
channels, and timed by LiteRT. A sum of terms that rise with these numbers is fitted to the times
(see `tf_kfacprune.graph.latency`). What the whole model takes beyond its layers is spread over the
values that its layers without weights read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, tree

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.atomic import write_bytes
from tf_kfacprune.export.conversion import convert
from tf_kfacprune.export.running import litert_job
from tf_kfacprune.export.serving import Signature, check_exportable
from tf_kfacprune.graph import (
    Call,
    ChannelGraph,
    ContractionRule,
    CostModel,
    LatencyTable,
    Value,
    analyze,
    layer_signature,
    rule_for,
)

__all__ = ["latency_table"]

# Shares of the input and output channels at which a layer is timed.
_WIDTHS = ((1.0, 1.0), (1.0, 0.25), (0.25, 1.0), (0.5, 0.5), (0.25, 0.25))
_BLOCKS, _RUNS, _BLOCK_SECONDS = 15, 50, 0.02

# Layers that can be built with fewer channels by their configuration alone.
_RESIZABLE = (
    *(layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D),
    *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
    *(layers.SeparableConv1D, layers.SeparableConv2D),
)


def latency_table(
    model: keras.Model,
    *,
    refresh: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LatencyTable:
    """Times of the layers of a model, with LiteRT on one thread of this machine, batch 1.

    Measured times are kept in a file per processor, so that the next call is quick. They are as
    good as the machine is quiet while they are taken.

    Args:
        model: A built Sequential or Functional model without gates: the one to be pruned.
        refresh: Measure again what has been measured before.
        cache_dir: Folder of the file; by default `.cache/tf_kfacprune` in the home folder.

    Returns:
        The table, for `PrunableModel(model, budget=Budget(latency=...), latency_table=...)`.

    Raises:
        UnsupportedModelError: If the model has gates or no symbolic inputs.
        ExportError: If a layer cannot be converted or timed, or the file cannot be written.

    Examples:
        >>> table = kp.export.latency_table(network)
        >>> pm = kp.PrunableModel(network, kp.Budget(latency=0.3), latency_table=table)
    """
    check_exportable(model, batch_size=1)
    channels = analyze(model)
    calls = {
        layer_signature(call): call
        for call in channels.graph.calls
        if isinstance(call.operation, keras.Layer)
        and list(rule_for(call.operation).macs(call, channels.flow))
    }
    cache = _Cache(cache_dir, refresh)
    rows = {name: cache.get(name, lambda c=call: _layer_row(c)) for name, call in calls.items()}
    totals = cache.get(_fingerprint(channels), lambda: _total_times([model]))
    cache.save()
    overhead, (total,) = totals[0], totals[1:]
    return _calibrated(channels, cache.processor, rows, overhead, total)


class _Cache:
    """The file of measured numbers for this processor and version of LiteRT.

    Attributes:
        processor: Name of the processor.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, refresh: bool) -> None:
        self.processor = _processor()
        base = Path.home() / ".cache" / "tf_kfacprune" if folder is None else Path(folder)
        key = f"{self.processor} litert {importlib.metadata.version('ai-edge-litert')}"
        self._path = base / f"latency_{re.sub(r'[^A-Za-z0-9.]+', '_', key)}.json"
        self._known: dict[str, list[float]] = {}
        if self._path.is_file():
            try:
                self._known = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ExportError(
                    f"{self._path} is not a file of latencies: {error}. Delete it, or choose "
                    "another cache_dir."
                ) from error
        self._refresh = refresh
        self._changed = False

    def get(self, name: str, measure: Any) -> list[float]:
        """The numbers under a name, measured if they are unknown or to be refreshed."""
        if self._refresh or name not in self._known:
            self._known[name] = measure()
            self._changed = True
        return self._known[name]

    def save(self) -> None:
        """Writes the file, whole or not at all, if something new was measured."""
        if self._changed:
            text = json.dumps(self._known, indent=1, sort_keys=True)
            write_bytes(self._path, f"{text}\n".encode(), overwrite=True)


def _calibrated(
    channels: ChannelGraph,
    processor: str,
    rows: dict[str, list[float]],
    overhead: float,
    total: float,
) -> LatencyTable:
    """The table whose time for the dense model is the measured one."""

    def dense(table: LatencyTable) -> float:
        return CostModel(channels, latency_table=table).dense("latency")

    weighted = LatencyTable(processor, {n: tuple(row) for n, row in rows.items()}, 0.0, overhead)
    of_weighted = dense(weighted)
    values = dense(LatencyTable(processor, weighted.layers, 1.0, overhead)) - of_weighted
    if total >= of_weighted and values > 0:
        per_value = (total - of_weighted) / values
        return LatencyTable(processor, weighted.layers, per_value, overhead)
    # Alone, layers take longer than together.
    factor = max(total - overhead, 0.0) / max(of_weighted - overhead, 1e-9)
    scaled = {name: tuple(factor * t for t in row) for name, row in weighted.layers.items()}
    return LatencyTable(processor, scaled, 0.0, overhead)


def _layer_row(call: Call) -> list[float]:
    """Coefficients of a layer: constant, per MAC, per input and output channel."""
    widths = _WIDTHS if _is_resizable(call.operation) else _WIDTHS[:1]
    probes = [_probe(call, *width) for width in widths]
    overhead, *times = _total_times(probes)
    own = np.maximum(np.array(times) - overhead, 1e-3)
    columns = np.array([_columns(probe) for probe in probes])
    if len(probes) == 1:
        columns[:, 2:] = 0.0
    return nonnegative_fit(columns, own).tolist()


def _is_resizable(layer: Any) -> bool:
    return type(layer) in _RESIZABLE and getattr(layer, "groups", 1) == 1


def _probe(call: Call, share_in: float, share_out: float) -> keras.Model:
    """A model of one layer, with shares of its input and output channels."""
    layer, rule = call.operation, rule_for(call.operation)
    config = layer.get_config()
    shapes = {value: list(value.shape[1:]) for value in call.inputs}
    if _is_resizable(layer) and isinstance(rule, ContractionRule):
        (value,) = call.inputs
        axis = rule.channel_axis(call) - 1
        shapes[value][axis] = max(1, round(share_in * (shapes[value][axis] or 1)))
        out = max(1, round(share_out * rule.out_size(layer)))
        rule.edit_config(layer, config, lambda role: out if role == "out" else None, ())
    inputs = {v: keras.Input(shape, dtype=v.dtype) for v, shape in shapes.items()}

    def fill(leaf: Any) -> Any:
        return inputs.get(leaf) if isinstance(leaf, Value) else leaf

    args, kwargs = tree.map_structure(fill, (call.args, call.without_gates(call.kwargs)))
    outputs = type(layer).from_config(config)(*args, **kwargs)
    return keras.Model(list(inputs.values()), outputs, name="probe")


def _columns(probe: keras.Model) -> tuple[float, float, float, float]:
    """What the times of a one-layer model depend on."""
    (call, *_) = [c for c in analyze(probe).graph.calls if c.operation.weights]
    macs = CostModel(analyze(probe)).dense("macs")
    read, created = (value.shape[-1] or 1 for value in (call.inputs[0], call.outputs[0]))
    return 1.0, float(macs), float(read), float(created)


def nonnegative_fit(columns: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 with the least squares of relative errors.

    Args:
        columns: What the times depend on, shape `(points, k)`, k small.
        times: Measured times, positive, shape `(points,)`.

    Returns:
        Coefficients of shape `(k,)`.
    """
    weighted = columns / times[:, None]
    best, least = np.zeros(columns.shape[1]), np.inf
    chosen = [k for k in range(columns.shape[1]) if columns[:, k].any()]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(chosen, size) for size in range(1, min(len(chosen), len(times)) + 1)
    )
    for subset in map(list, subsets):
        solution, *_ = np.linalg.lstsq(weighted[:, subset], np.ones(len(times)), rcond=None)
        error = float(np.sum((weighted[:, subset] @ solution - 1.0) ** 2))
        if (solution >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(columns.shape[1]), error
            best[subset] = solution
    return best


def _total_times(models: Sequence[keras.Model]) -> list[float]:
    """Microseconds of calling nothing, then of each model."""
    nothing = keras.Input((1,), name="nothing")
    empty = keras.Model(nothing, layers.ReLU()(nothing), name="empty")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, model in enumerate([empty, *models]):
            file = Path(folder) / f"{number}.tflite"
            file.write_bytes(convert(model, Signature.of(model, 1)))
            files.append(os.fspath(file))
        job = {
            "files": files,
            "threads": 1,
            "batch_size": 1,
            "blocks": _BLOCKS,
            "runs": _RUNS,
            "block_seconds": _BLOCK_SECONDS,
        }
        names = ", ".join(model.name for model in models)
        times = litert_job("time", job, what=names)["microseconds"]
    # The fastest blocks are those that nothing else disturbed.
    return np.quantile(times, 0.25, axis=0).tolist()


def _fingerprint(channels: ChannelGraph) -> str:
    """A name for a whole model: its layers in order."""
    signatures = [
        layer_signature(call)
        for call in channels.graph.calls
        if isinstance(call.operation, keras.Layer)
    ]
    digest = hashlib.sha256("; ".join(signatures).encode()).hexdigest()
    return f"model {digest}"


def _processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
