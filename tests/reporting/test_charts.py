"""Line charts: round marks, scales that fit, and lines that break where a value is missing."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tf_kfacprune.reporting.charts import Band, Line, line_chart, number, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.71, 0.99, [0.7, 0.8, 0.9, 1.0]),
        (-3.0, 12.0, [-5.0, 0.0, 5.0, 10.0, 15.0]),
        (2.0, 2.0, [1.8, 1.9, 2.0, 2.1, 2.2]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_marks_are_round_and_enclose_the_range(low, high, expected):
    assert ticks(low, high) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (12300.4, "12,300"), (0.01234, "0.0123"), (15.0, "15"), (2.3e-7, "2e-07")],
)
def test_numbers_have_three_digits(value, shown):
    assert number(value) == shown


def drawn(lines, **options):
    figure = line_chart(lines, x_range=(0, 4), x_label="epochs", title="T & U", **options)
    root = ElementTree.fromstring(figure)  # raises unless the markup is closed and escaped
    return root, [element.text for element in root.iter("text")]


def test_values_within_a_decade_are_drawn_in_proportion():
    root, texts = drawn([Line("a", [(0, 0.0), (2, 5.0), (4, 10.0)], "blue")])
    (path,) = [p.get("d") for p in root.iter("path") if p.get("class") == "line"]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split()) for p in path[1:].split("L"))
    assert (x1, y1) == ((x0 + x2) / 2, (y0 + y2) / 2)
    assert texts == ["0", "2", "4", "6", "8", "10", "0", "1", "2", "3", "4", "epochs"]
    assert len(list(root.iter("circle"))) == 3


def test_values_over_a_decade_are_drawn_on_a_logarithmic_scale():
    root, texts = drawn([Line("a", [(0, 0.01), (2, 0.1), (4, 1.0)], "blue")], percent=True)
    (path,) = [p.get("d") for p in root.iter("path") if p.get("class") == "line"]
    (_, y0), (_, y1), (_, y2) = (map(float, p.split()) for p in path[1:].split("L"))
    assert y1 == pytest.approx((y0 + y2) / 2)
    assert "(logarithmic)" in "".join(root.itertext())
    assert texts[:3] == ["1 %", "2 %", "5 %"]


def test_a_line_is_broken_where_a_value_is_not_finite():
    points = [(0, 1.0), (1, math.nan), (2, 2.0), (3, math.inf), (4, 1.5)]
    root, _ = drawn([Line("a", points, "blue")])
    (path,) = [p.get("d") for p in root.iter("path") if p.get("class") == "line"]
    assert path.count("M") == 3
    assert len(list(root.iter("circle"))) == 3
    assert line_chart([Line("a", [(0, math.nan)], "b")], x_range=(0, 1), x_label="", title="") == ""


def test_bands_are_cut_to_the_range_and_long_or_dashed_lines_have_no_dots():
    long = Line("long", [(k / 20, 1.0 + k) for k in range(80)], "blue")
    budget = Line("budget", [(0, 5.0), (4, 5.0)], "green", dashed=True)
    bands = [Band(-1, 1, "warmup"), Band(1, 9, "prune"), Band(9, 10, "page")]
    root, _ = drawn([long, budget], bands=bands)
    first, second = root.iter("rect")
    end = float(first.get("x")) + float(first.get("width"))
    assert end == pytest.approx(float(second.get("x")))
    assert re.search(r"--warmup", first.get("fill"))
    assert not list(root.iter("circle"))
    assert [p.get("stroke-dasharray") for p in root.iter("path") if p.get("class") == "line"] == [
        None,
        "5 4",
    ]


@pytest.mark.parametrize(("low", "high"), [(1e-9, 1e3), (0.9, 9.1), (1e-4, 0.5), (3.0, 400.0)])
def test_logarithmic_marks_are_few_and_enclose_the_values(low, high):
    _, texts = drawn([Line("a", [(0, low), (4, high)], "blue")])
    marks = [float(text.replace(",", "")) for text in texts[: texts.index("epochs") - 5]]
    assert marks[0] <= low * 1.001
    assert marks[-1] >= high * 0.999
    assert 3 <= len(marks) <= 8
