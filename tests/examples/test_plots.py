"""The pictures of the benchmarks: no label stands on another."""

from __future__ import annotations

import itertools

import pytest

matplotlib = pytest.importorskip("matplotlib")


def overlapping(figure):
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
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    yield figures
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.mark.parametrize(
    ("benchmark", "command"),
    [("frontier", "plot"), ("flatness", "run_plot"), ("readme_picture", "draw")],
)
def test_no_label_stands_on_another(load_benchmark, figures, benchmark, command):
    arguments = ("light",) if command == "draw" else ()
    getattr(load_benchmark(benchmark), command)(*arguments)
    (figure,) = figures
    assert overlapping(figure) == []


def test_the_check_notices_labels_that_overlap():
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    axis.set_xticks([0, 1])
    axis.text(0.5, 0.5, "one")
    axis.text(0.51, 0.5, "two")
    assert overlapping(figure) == [("one", "two")]
