"""Models in every format, side by side: bytes, latency and accuracy of the written files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError
from tf_kfacprune.export.file_sizes import FileSize, file_size
from tf_kfacprune.export.options import FULL_INTEGER
from tf_kfacprune.export.tflite_files import run_tflite, tflite
from tf_kfacprune.export.timing import latency

__all__ = ["Benchmark", "BenchmarkRow", "benchmark"]


@dataclass(frozen=True)
class BenchmarkRow:
    """One model in one format.

    Attributes:
        model: name of the model.
        quantization: format of the file; None is float32.
        size: bytes of the file.
        microseconds: median time of one inference.
        ratio: median ratio of the time to that of the first row.
        accuracy: fraction of right predictions of the file; None if no data were given.
    """

    model: str
    quantization: str | None
    size: FileSize
    microseconds: float
    ratio: float
    accuracy: float | None


@dataclass(frozen=True)
class Benchmark:
    """The result of `benchmark`; printing it shows a table.

    Attributes:
        rows: one for each model and format; the first is what the ratios refer to.
        threads: number of threads.
        failures: what could not be converted or run, with the converter's message.
    """

    rows: tuple[BenchmarkRow, ...]
    threads: int
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [("model", "format", "bytes", "gzip", "us", "x first", "accuracy")]
        for row in self.rows:
            lines.append(
                (
                    row.model,
                    row.quantization or "float32",
                    f"{row.size.raw:,}",
                    f"{row.size.gzip:,}",
                    f"{row.microseconds:.1f}",
                    f"{row.ratio:.3f}",
                    "-" if row.accuracy is None else f"{100 * row.accuracy:.2f} %",
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join([*text, *(f"failed: {failure}" for failure in self.failures)])


def benchmark(
    models: Mapping[str, keras.Model],
    *,
    quantizations: Sequence[str | None] = (None, "float16", "dynamic"),
    representative_data: Any = None,
    data: Sequence[Any] | None = None,
    threads: int = 1,
    blocks: int = 30,
) -> Benchmark:
    """Writes every model in every format, verifies the files and measures them together.

    Args:
        models: name -> model without gates; the first in the first format is the reference of
            the latency ratios, so the dense model goes first.
        quantizations: formats, as `tflite` takes them.
        representative_data: real inputs for the full integer formats.
        data: ``(x, y)``, one input array and integer labels, to measure the accuracy of the files
            on. Without it none is measured.
        threads: number of threads.
        blocks: interleaved blocks of the latency measurement.

    Returns:
        Bytes, latency and accuracy of each file. The batch size is 1. A format that the converter
        or LiteRT cannot handle for a model is listed under ``failures``, if it is not the first.

    Raises:
        InvalidArgumentError: if nothing is to be measured or an option is unknown.
        DataError: if the data do not fit the models.
        ExportError: if the first model cannot be written in the first format.

    Example:
        >>> import tf_kfacprune as kp
        >>> print(kp.export.benchmark({"dense": dense, "compact": small}))  # doctest: +SKIP
    """
    if not models or not quantizations:
        raise InvalidArgumentError("Pass at least one model and one quantization to measure.")
    if data is not None and (not isinstance(data, tuple | list) or len(data) != 2):
        raise InvalidArgumentError(f"data must be a pair (x, y). Received: {type(data).__name__}.")
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        files: dict[tuple[str, str | None], Path] = {}
        for name, model in models.items():
            for quantization in quantizations:
                path = Path(folder) / f"{len(files) + len(failures)}.tflite"
                calibration = representative_data if quantization in FULL_INTEGER else None
                try:
                    files[name, quantization] = tflite(
                        model,
                        path,
                        quantization=quantization,
                        representative_data=calibration,
                        batch_size=1,
                    )
                except ExportError as error:
                    if not files:
                        raise
                    failures.append(f"{name} as {quantization or 'float32'}: {error}")
        labels = {f"{name} {quantization}": file for (name, quantization), file in files.items()}
        times = latency(labels, threads=threads, blocks=blocks)
        rows = [
            BenchmarkRow(
                model=name,
                quantization=quantization,
                size=file_size(file),
                microseconds=times.microseconds[label],
                ratio=times.ratios[label],
                accuracy=None if data is None else _accuracy(file, *data),
            )
            for label, ((name, quantization), file) in zip(labels, files.items(), strict=True)
        ]
    return Benchmark(tuple(rows), threads, tuple(failures))


def _accuracy(file: Path, x: Any, y: Any) -> float:
    outputs = run_tflite(file, np.asarray(x))
    labels = np.asarray(y).reshape(-1)
    if isinstance(outputs, dict) or outputs.ndim != 2 or len(outputs) != len(labels):
        raise DataError(
            "Accuracy needs one output of shape (n, classes) and a label for each input. Found "
            f"{len(labels)} labels."
        )
    return float(np.mean(outputs.argmax(axis=1) == labels))
