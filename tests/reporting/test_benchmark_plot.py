"""The picture of a benchmark: written whole, in the format its name says."""

from __future__ import annotations

import sys

import pytest

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export import Benchmark, BenchmarkRow, FileSize
from tf_kfacprune.reporting import plot_benchmark

RESULT = Benchmark(
    (
        BenchmarkRow("dense", None, 1, FileSize(4000, 3000), 20.0, 1.0, 64),
        BenchmarkRow("compact", "int8", 1, FileSize(400, 300), 5.0, 0.25, 16),
    )
)


def test_picture_has_a_bar_for_each_row(tmp_path):
    pytest.importorskip("matplotlib")
    text = plot_benchmark(RESULT, tmp_path / "plot.svg").read_text()
    assert text.startswith("<?xml")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    assert plot_benchmark(RESULT, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_other_formats_and_missing_matplotlib_are_named(tmp_path, monkeypatch):
    with pytest.raises(InvalidArgumentError, match=r"\.png, \.svg, \.pdf.*plot\.bmp"):
        plot_benchmark(RESULT, tmp_path / "plot.bmp")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExportError, match="pip install matplotlib"):
        plot_benchmark(RESULT, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
