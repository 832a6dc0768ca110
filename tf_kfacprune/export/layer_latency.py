"""Measures how long each layer of a model takes on this machine, for budgets of latency.

Every distinct layer is converted on its own, with several numbers of input and output channels
(`probes`), and timed by LiteRT; curves are laid through the times (`latency_curves`). The whole
model is timed as well: layers take longer or shorter together than alone, and all curves are
multiplied by that ratio.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
from keras import layers

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.atomic import write_bytes
from tf_kfacprune.export.conversion import convert
from tf_kfacprune.export.file_parts import file_parts
from tf_kfacprune.export.latency_curves import layer_times
from tf_kfacprune.export.probes import FIXED, LayerProbes
from tf_kfacprune.export.running import litert_job
from tf_kfacprune.export.samples import random_examples
from tf_kfacprune.export.serving import Signature, check_exportable
from tf_kfacprune.graph import (
    ChannelGraph,
    CostModel,
    LatencyTable,
    analyze,
    layer_signature,
)
from tf_kfacprune.graph.latency import LATENCY_OF, takes_time

__all__ = ["latency_table"]

# The fastest of these blocks are those that nothing else disturbed.
_BLOCKS, _RUNS, _BLOCK_SECONDS, _FASTEST = 30, 15, 0.015, 0.1
# So much is converted at once. Packed weights are held several times over.
_PROBES_AT_ONCE, _WEIGHTS_AT_ONCE = 60, 10_000_000
_EXAMPLES = 4  # to calibrate int8 with: times do not depend on them

# Raised when what is measured changes: files of other formats are measured again.
_FORMAT = 2


def latency_table(
    model: keras.Model,
    *,
    of: str = "float32",
    refresh: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LatencyTable:
    """Times of the layers of a model, with LiteRT on one thread of this machine, batch 1.

    Takes a few seconds for each distinct layer. Measured times are kept in a file per processor, so
    that the next call is quick. They are as good as the machine is quiet while they are taken.

    Args:
        model: A built Sequential or Functional model without gates: the one to be pruned.
        of: Which file `Budget(latency=...)` is to bound with this table: `"float32"`, or `"int8"`
            for the full int8 file, whose layers gain differently.
        refresh: Measure again what has been measured before.
        cache_dir: Folder of the file; by default `.cache/tf_kfacprune` in the home folder.

    Returns:
        The table, for `PrunableModel(model, budget=Budget(latency=...), latency_table=...)`.

    Raises:
        InvalidArgumentError: If `of` is neither of these.
        UnsupportedModelError: If the model has gates or no symbolic inputs.
        ExportError: If a layer cannot be converted or timed, or the file cannot be written.

    Examples:
        >>> table = kp.export.latency_table(network, of="int8")
        >>> pm = kp.PrunableModel(network, kp.Budget(latency=0.3), latency_table=table)
    """
    if of not in LATENCY_OF:
        raise InvalidArgumentError(
            f"Argument `of` of latency_table must be one of {LATENCY_OF}. Received: of={of!r}"
        )
    check_exportable(model, batch_size=1)
    channels = analyze(model)
    probes = {
        layer_signature(call): LayerProbes.of(call, channels)
        for call in channels.graph.calls
        if isinstance(call.operation, keras.Layer) and takes_time(call)
    }
    cache = _Cache(cache_dir, of, refresh)
    missing = {name: layer for name, layer in probes.items() if name not in cache}
    for part in _parts(missing):
        cache.add(_measured(part, of))
    whole = _fingerprint(channels)
    if whole not in cache:
        content = _converted(model, of)
        overhead, total = _total_times([_nothing(of), content])
        cache.add({whole: [[0, 0, overhead], [1, 1, total]]})
    (*_, overhead), (*_, total) = cache[whole]
    rows = {
        name: layer_times({(int(n), int(m)): time for n, m, time in cache[name]}) for name in probes
    }
    return _calibrated(channels, LatencyTable(cache.processor, rows, of, 1.0, overhead), total)


class _Cache:
    """The file of measured numbers for this processor and version of LiteRT.

    It holds what was measured, not what was made of it: for each layer rows of channels read,
    channels created, microseconds; for a whole model the time of nothing, and its own.

    Attributes:
        processor: Name of the processor.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, of: str, refresh: bool) -> None:
        self.processor = _processor()
        base = Path.home() / ".cache" / "tf_kfacprune" if folder is None else Path(folder)
        key = f"{self.processor} litert {importlib.metadata.version('ai-edge-litert')}"
        self._path = base / f"latency_{re.sub(r'[^A-Za-z0-9.]+', '_', key)}.json"
        self._of, self._refresh = of, refresh
        self._known = self._read()
        self._fresh: set[str] = set()

    def _read(self) -> dict[str, dict[str, list[list[float]]]]:
        empty: dict[str, dict[str, list[list[float]]]] = {of: {} for of in LATENCY_OF}
        if not self._path.is_file():
            return empty
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExportError(
                f"{self._path} is not a file of latencies: {error}. Delete it, or choose "
                "another cache_dir."
            ) from error
        return stored["times"] if stored.get("format") == _FORMAT else empty

    def __contains__(self, name: str) -> bool:
        return name in (self._fresh if self._refresh else self._known[self._of])

    def __getitem__(self, name: str) -> list[list[float]]:
        return self._known[self._of][name]

    def add(self, measured: dict[str, list[list[float]]]) -> None:
        """Writes the file with what was measured, whole or not at all."""
        self._known[self._of].update(measured)
        self._fresh.update(measured)
        text = json.dumps({"format": _FORMAT, "times": self._known}, indent=1, sort_keys=True)
        write_bytes(self._path, f"{text}\n".encode(), overwrite=True)


def _calibrated(channels: ChannelGraph, table: LatencyTable, total: float) -> LatencyTable:
    """The table whose time for the dense model is the measured one."""
    alone = CostModel(channels, latency_table=table).dense("latency") - table.overhead
    scale = max(total - table.overhead, 0.0) / max(alone, 1e-9)
    return replace(table, scale=scale)


def _parts(probes: dict[str, LayerProbes]) -> Iterator[dict[str, LayerProbes]]:
    """Layers that are measured together."""
    part: dict[str, LayerProbes] = {}
    count = weights = 0
    for name, layer in probes.items():
        more = len(layer.channels())
        heavy = more * layer.call.operation.count_params() // 3
        is_alone = layer.dense == FIXED  # it may have loops, and cannot be cut out of a file
        if part and (
            is_alone or count + more > _PROBES_AT_ONCE or weights + heavy > _WEIGHTS_AT_ONCE
        ):
            yield part
            part, count, weights = {}, 0, 0
        if is_alone:
            yield {name: layer}
            continue
        part[name] = layer
        count, weights = count + more, weights + heavy
    if part:
        yield part


def _measured(part: dict[str, LayerProbes], of: str) -> dict[str, list[list[float]]]:
    """Rows of channels read, channels created and microseconds for each layer."""
    asked = [(name, channels) for name, layer in part.items() for channels in layer.channels()]
    built = [part[name].build(channels) for name, channels in asked]
    probes = keras.Model(
        [tensor for inputs, _ in built for tensor in inputs],
        [output for _, output in built],
        name="probes",
    )
    try:
        content = _converted(probes, of)
    except ExportError as error:
        paths = ", ".join(layer.call.path for layer in part.values())
        raise ExportError(
            f"The time of these layers cannot be measured: {paths}. {error}"
        ) from error
    outputs = Signature.of(probes, 1).outputs
    files = [content] if len(outputs) == 1 else file_parts(content, outputs)
    overhead, *times = _total_times([_nothing(of), *files])
    rows: dict[str, list[list[float]]] = {name: [] for name in part}
    for (name, channels), time in zip(asked, times, strict=True):
        rows[name].append([*channels, max(time - overhead, 0.0)])
    return rows


@functools.cache
def _nothing(of: str) -> bytes:
    """The file of a network with as good as nothing in it."""
    inputs = keras.Input((1,), name="nothing")
    return _converted(keras.Model(inputs, layers.ReLU()(inputs), name="empty"), of)


def _converted(model: keras.Model, of: str) -> bytes:
    """The file of a model; in int8, calibrated with random numbers."""
    signature = Signature.of(model, 1)
    if of == "float32":
        return convert(model, signature)
    return convert(model, signature, of, representative=random_examples(signature, _EXAMPLES))


def _total_times(files: Sequence[bytes]) -> list[float]:
    """Microseconds of each file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, content in enumerate(files):
            path = Path(folder) / f"{number}.tflite"
            path.write_bytes(content)
            paths.append(os.fspath(path))
        job = {
            "files": paths,
            "threads": 1,
            "batch_size": 1,
            "blocks": _BLOCKS,
            "runs": _RUNS,
            "block_seconds": _BLOCK_SECONDS,
        }
        times = litert_job("time", job, what="a layer")["microseconds"]
    return np.quantile(times, _FASTEST, axis=0).tolist()


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
