"""Benchmarks as modules, without leaving their flags behind."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest
from absl import flags

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(name="load_benchmark", scope="module")
def benchmark_loader():
    before = set(flags.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))

        def load(name):
            module = importlib.import_module(name)
            flags.FLAGS([name])
            return module

        yield load
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@pytest.fixture(name="overlapping", scope="session")
def overlap_check():
    return overlapping_labels


def overlapping_labels(figure):
    """Pairs of labels of an axis, its marks and its annotations, that overlap."""
    figure.canvas.draw()
    pairs = []
    for axis in figure.axes:
        shown = [*axis.get_xticklabels("both"), *axis.get_yticklabels("both"), *axis.texts]
        boxes = [(t.get_text(), t.get_window_extent()) for t in shown if t.get_text()]
        low, high = axis.get_window_extent().expanded(1.2, 1.2).get_points()
        inside = [b for b in boxes if (low <= b[1].min).all() and (b[1].max <= high).all()]
        pairs += [
            (first, second)
            for (first, a), (second, b) in itertools.combinations(inside, 2)
            if a.overlaps(b)
        ]
    return pairs


@pytest.fixture(name="figures")
def drawn_figures(monkeypatch):
    """Figures that were to be saved, instead of files."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda figure, *_, **__: figures.append(figure)
    )
    yield figures
    from matplotlib import pyplot

    pyplot.close("all")
