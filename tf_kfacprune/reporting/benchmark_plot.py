"""A benchmark as a picture: bytes and time of every model in every format, relative to dense."""

from __future__ import annotations

import io
import os
from pathlib import Path

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export import Benchmark
from tf_kfacprune.export.atomic import write_bytes

__all__ = ["check_picture", "plot_benchmark"]

_FORMATS = (".png", ".svg", ".pdf")


def plot_benchmark(
    benchmark: Benchmark, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Draws file bytes and latencies, each as a ratio to the first row, on logarithmic axes.

    Args:
        benchmark: the result of `tf_kfacprune.export.benchmark`.
        path: the picture to write: ``.png``, ``.svg`` or ``.pdf``.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: if the name ends differently.
        ExportError: if matplotlib is not installed, or the path exists or cannot be written.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.reporting.plot_benchmark(result, "benchmark.png")  # doctest: +SKIP
        PosixPath('benchmark.png')
    """
    check_picture(path)
    suffix = Path(path).suffix
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExportError(
            "matplotlib is needed to draw and is not installed. Install it with "
            "pip install matplotlib."
        ) from error
    first = benchmark.rows[0]
    names = [
        f"{row.model}, {row.quantization or 'float32'}, {row.threads} thread"
        + "s" * (row.threads > 1)
        for row in benchmark.rows
    ]
    panels = {
        "file bytes / first": [row.size.raw / first.size.raw for row in benchmark.rows],
        "time / first with as many threads": [row.ratio for row in benchmark.rows],
    }
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(names)), layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(1, 2, sharey=True), panels.items(), strict=True
    ):
        bars = axes.barh(names, values, color=["0.6" if v == 1 else "C0" for v in values])
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.5, max(values) * 3)
        axes.set_xlabel(title)
        axes.invert_yaxis()
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix[1:], dpi=150)
    return write_bytes(path, picture.getvalue(), overwrite=overwrite)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuses names of pictures that cannot be drawn.

    Args:
        path: Where the picture is to be written.

    Raises:
        InvalidArgumentError: If the name does not end as one of a picture.
    """
    if Path(path).suffix not in _FORMATS:
        raise InvalidArgumentError(
            f"The name of a picture must end in one of {', '.join(_FORMATS)}. Received: "
            f"{os.fspath(path)}."
        )
