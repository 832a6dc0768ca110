"""The before/after table: every figure, every ratio, and dashes for what is unknown."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from tf_kfacprune.export import FileSize
from tf_kfacprune.pruning import BudgetOutcome
from tf_kfacprune.reporting import Comparison, Flatness, ModelFigures

OPEN = BudgetOutcome(1.0, 1.0)
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


def test_notebook_gets_a_real_table_with_the_figures():
    comparison = Comparison(
        DENSE, COMPACT, budget={"macs": BudgetOutcome(0.08, 0.07, "a < b"), "params": OPEN}
    )
    html = comparison._repr_html_()
    table = ElementTree.fromstring(f"<div>{html}</div>").find("table")
    head = [cell.text or "" for cell in table.find("thead/tr")]
    body = {row[0].text: [cell.text for cell in row[1:]] for row in table.find("tbody")}
    assert head == ["", "dense", "compact", "left"]
    assert {"": head[1:], **body} == rows(comparison)
    assert body["parameters"] == ["266,610", "19,700", "7.4 %"]
    assert "<p>budget of macs: a &lt; b</p>" in html
    # Where the page has no style for tables, cells do not touch.
    assert all("padding-left" in cell.get("style") for row in table.iter("tr") for cell in row[1:])


def test_flatness_is_shown_where_it_was_measured():
    dense = replace(DENSE, flatness=Flatness(20.0, 1500.0, 500))
    small = replace(COMPACT, flatness=Flatness(5.0, 150.0, 500))
    table = rows(Comparison(dense, small))
    assert table["top Hessian eigenvalue"] == ["20", "5", "25.0 %"]
    assert table["same, scale-invariant"] == ["1,500", "150", "10.0 %"]
    unknown = replace(COMPACT, flatness=Flatness(None, None, 500, "no second derivative"))
    assert rows(Comparison(dense, unknown))["top Hessian eigenvalue"] == ["20", "–", "–"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    reason = "the cheapest that could reopen, 1 neuron of a layer, would make macs=0.2 of 0.1"
    comparison = Comparison(DENSE, COMPACT, budget={"macs": BudgetOutcome(0.1, 0.09, reason)})
    assert max(map(len, str(comparison).splitlines())) <= width
    assert rows(comparison)["parameters"] == ["266,610", "19,700", "7.4 %"]
