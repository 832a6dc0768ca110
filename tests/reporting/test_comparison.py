"""The before/after table: every figure, every ratio, and dashes for what is unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tf_kfacprune.export import FileSize
from tf_kfacprune.reporting import Comparison, ModelFigures

DENSE = ModelFigures(
    neurons={"image": 784, "fc1": 300, "fc2": 100},
    params=266_610,
    macs=266_200,
    tflite=FileSize(1_070_000, 990_000),
    accuracy=0.9813,
    latency_us=20.0,
)
COMPACT = ModelFigures(
    neurons={"image": 222, "fc1": 71, "fc2": 47},
    params=19_700,
    macs=19_000,
    tflite=FileSize(82_000, 75_000),
    accuracy=0.9805,
    latency_us=5.0,
)


def rows(comparison):
    """label -> cells of the printed table."""
    table = {}
    for line in str(comparison).splitlines():
        cells = [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        if len(cells) == 4:
            table[cells[0]] = cells[1:]
    return table


def test_every_figure_is_shown_with_what_is_left():
    table = rows(Comparison(DENSE, COMPACT))
    assert table[""] == ["dense", "compact", "left"]
    assert table["neurons of image"] == ["784", "222", "28.3 %"]
    assert table["neurons of fc2"] == ["100", "47", "47.0 %"]
    assert table["parameters"] == ["266,610", "19,700", "7.4 %"]
    assert table["MACs"] == ["266,200", "19,000", "7.1 %"]
    assert table[".tflite bytes"] == ["1,070,000", "82,000", "7.7 %"]
    assert table[".tflite bytes, gzip"] == ["990,000", "75,000", "7.6 %"]
    assert table["accuracy"] == ["98.13 %", "98.05 %", "-0.08 points"]
    assert table["latency"] == ["20.0 µs", "5.0 µs", "25.0 %"]


def test_measured_latency_ratio_goes_before_the_quotient_of_the_times():
    assert rows(Comparison(DENSE, COMPACT, latency_ratio=0.31))["latency"][2] == "31.0 %"


def test_unknown_figures_are_dashes_and_unknown_rows_are_left_out():
    dense = replace(DENSE, accuracy=None, latency_us=None, tflite=None)
    table = rows(Comparison(dense, replace(COMPACT, latency_us=None)))
    assert table["accuracy"] == ["–", "98.05 %", "–"]
    assert table[".tflite bytes"] == ["–", "82,000", "–"]
    assert "latency" not in table


def test_layer_that_is_gone_is_a_dash():
    table = rows(Comparison(DENSE, replace(COMPACT, neurons={"fc1": 71})))
    assert table["neurons of fc2"] == ["100", "–", "–"]


def test_fraction_left_is_exact():
    comparison = Comparison(DENSE, COMPACT)
    assert comparison.fraction("macs") == pytest.approx(19_000 / 266_200)
    assert Comparison(replace(DENSE, macs=None), COMPACT).fraction("macs") is None


def test_notebook_gets_html_with_the_figures():
    html = Comparison(DENSE, COMPACT)._repr_html_()
    assert html.startswith("<pre")
    assert "266,610" in html
