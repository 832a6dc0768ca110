"""Models in every format, side by side: bytes, latency, memory and accuracy of written files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export.arena import activation_bytes
from tf_kfacprune.export.file_sizes import FileSize, file_size
from tf_kfacprune.export.options import FULL_INTEGER
from tf_kfacprune.export.running import litert_job
from tf_kfacprune.export.tflite_files import run_tflite, tflite
from tf_kfacprune.export.timing import latency
from tf_kfacprune.graph import CostModel, analyze

__all__ = ["Benchmark", "BenchmarkRow", "benchmark"]


@dataclass(frozen=True)
class BenchmarkRow:
    """One model in one format, run with one number of threads.

    Attributes:
        model: name of the model.
        quantization: format of the file; None is float32.
        threads: number of threads.
        size: bytes of the file.
        microseconds: median time of one inference.
        ratio: median ratio of the time to that of the first row with as many threads.
        activations: bytes that the activations need at least.
        memory: bytes by which the memory of a process grew at most while it loaded the file and
            ran it once; the runtime's own buffers are in it. None where it cannot be measured.
        macs: multiply-accumulates of one inference; None if the model cannot be analyzed.
        macs_ratio: ratio of the MACs to those of the first model.
        accuracy: fraction of right predictions of the file; None if no data were given.
    """

    model: str
    quantization: str | None
    threads: int
    size: FileSize
    microseconds: float
    ratio: float
    activations: int
    memory: int | None = None
    macs: int | None = None
    macs_ratio: float | None = None
    accuracy: float | None = None

    @property
    def time_per_macs(self) -> float | None:
        """Time ratio / MACs ratio: 1 if the MACs saved turned into time, more if they did not."""
        return None if not self.macs_ratio else self.ratio / self.macs_ratio


@dataclass(frozen=True)
class Benchmark:
    """The result of `benchmark`; printing it shows a table.

    Attributes:
        rows: one for each number of threads, model and format; the first of each number of threads
            is what its ratios refer to.
        failures: what could not be converted or run, with the converter's message. Their logs are
            in the folder for temporary files.
    """

    rows: tuple[BenchmarkRow, ...]
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [tuple(_COLUMNS)]
        lines += [tuple(show(row) for show in _COLUMNS.values()) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([*text, *(f"failed: {failure}" for failure in self.failures)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        rows = [asdict(row) | {"time_per_macs": row.time_per_macs} for row in self.rows]
        return {"rows": rows, "failures": list(self.failures)}


_COLUMNS: dict[str, Any] = {
    "model": lambda row: row.model,
    "format": lambda row: row.quantization or "float32",
    "threads": lambda row: str(row.threads),
    "bytes": lambda row: f"{row.size.raw:,}",
    "gzip": lambda row: f"{row.size.gzip:,}",
    "activations": lambda row: f"{row.activations:,}",
    "memory": lambda row: "-" if row.memory is None else f"{row.memory / 1e6:.1f} MB",
    "us": lambda row: f"{row.microseconds:.1f}",
    "x first": lambda row: f"{row.ratio:.3f}",
    "MACs x first": lambda row: "-" if row.macs_ratio is None else f"{row.macs_ratio:.3f}",
    "accuracy": lambda row: "-" if row.accuracy is None else f"{100 * row.accuracy:.2f} %",
}


def benchmark(
    models: Mapping[str, keras.Model],
    *,
    quantizations: Sequence[str | None] = (None, "float16", "dynamic"),
    representative_data: Any = None,
    data: Sequence[Any] | None = None,
    threads: int | Sequence[int] = 1,
    blocks: int = 30,
) -> Benchmark:
    """Writes every model in every format, verifies the files and measures them together.

    Args:
        models: name -> model without gates; the first in the first format is the reference of
            the ratios, so the dense model goes first.
        quantizations: formats, as `tflite` takes them.
        representative_data: real inputs for the full integer formats.
        data: ``(x, y)``, one input array and integer labels, to measure the accuracy of the files
            on. Without it none is measured.
        threads: number of threads, or several numbers to measure one after the other.
        blocks: interleaved blocks of the latency measurement.

    Returns:
        Bytes, latency, memory and accuracy of each file. The batch size is 1. A format that the
        converter or LiteRT cannot handle for a model is listed under ``failures``, if it is not
        the first.

    Raises:
        InvalidArgumentError: if nothing is to be measured or an option is unknown.
        DataError: if the data do not fit the models.
        ExportError: if the first model cannot be written in the first format.

    Examples:
        >>> import tf_kfacprune as kp
        >>> print(kp.export.benchmark({"dense": dense, "compact": small}))  # doctest: +SKIP
    """
    counts = (threads,) if isinstance(threads, int) else tuple(threads)
    if not models or not quantizations or not counts:
        raise InvalidArgumentError(
            "Pass at least one model, one quantization and one number of threads to measure."
        )
    if data is not None and (not isinstance(data, tuple | list) or len(data) != 2):
        raise InvalidArgumentError(f"data must be a pair (x, y). Received: {type(data).__name__}.")
    macs = {name: _macs(model) for name, model in models.items()}
    reference = next(iter(macs.values()))
    with tempfile.TemporaryDirectory() as folder:
        files, failures = _written(models, quantizations, representative_data, Path(folder))
        labels = {f"{name} {quantization}": file for (name, quantization), file in files.items()}
        fixed = {key: _measured(file, data) for key, file in files.items()}
        rows = []
        for count in counts:
            times = latency(labels, threads=count, blocks=blocks)
            for label, (name, quantization) in zip(labels, files, strict=True):
                own = macs[name]
                rows.append(
                    BenchmarkRow(
                        model=name,
                        quantization=quantization,
                        threads=count,
                        microseconds=times.microseconds[label],
                        ratio=times.ratios[label],
                        macs=own,
                        macs_ratio=own / reference if own and reference else None,
                        **fixed[name, quantization],
                    )
                )
    return Benchmark(tuple(rows), tuple(failures))


def _written(
    models: Mapping[str, keras.Model],
    quantizations: Sequence[str | None],
    representative_data: Any,
    folder: Path,
) -> tuple[dict[tuple[str, str | None], Path], list[str]]:
    """The files by model and format, and what failed."""
    files: dict[tuple[str, str | None], Path] = {}
    failures: list[str] = []
    for name, model in models.items():
        for quantization in quantizations:
            path = folder / f"{len(files) + len(failures)}.tflite"
            calibration = representative_data if quantization in FULL_INTEGER else None
            try:
                files[name, quantization] = tflite(
                    model,
                    path,
                    quantization=quantization,
                    representative_data=calibration,
                    batch_size=1,
                )
            except (ExportError, UnsupportedModelError) as error:
                if not files:
                    raise
                reason = _reason(error).replace(f"{folder}{os.sep}", "")
                failures.append(f"{name} as {quantization or 'float32'}: {reason}")
    return files, failures


def _reason(error: Exception) -> str:
    """What went wrong. An error of an export is the cause of one that names the log as well."""
    return str(error.__cause__ if isinstance(error.__cause__, ExportError) else error)


def _measured(file: Path, data: Sequence[Any] | None) -> dict[str, Any]:
    """What does not depend on the number of threads."""
    grown = int(litert_job("memory", {"file": os.fspath(file)}, what=file.name)["bytes"])
    return {
        "size": file_size(file),
        "activations": activation_bytes(file),
        "memory": grown if grown > 0 else None,
        "accuracy": None if data is None else _accuracy(file, *data),
    }


def _macs(model: keras.Model) -> int | None:
    try:
        return int(CostModel(analyze(model)).dense("macs"))
    except UnsupportedModelError:
        return None


def _accuracy(file: Path, x: Any, y: Any) -> float:
    outputs = run_tflite(file, np.asarray(x))
    labels = np.asarray(y).reshape(-1)
    if isinstance(outputs, dict) or outputs.ndim != 2 or len(outputs) != len(labels):
        raise DataError(
            "Accuracy needs one output of shape (n, classes) and a label for each input. Found "
            f"{len(labels)} labels."
        )
    return float(np.mean(outputs.argmax(axis=1) == labels))
