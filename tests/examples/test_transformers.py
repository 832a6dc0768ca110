"""The transformers of the example: data, networks of a width, one run at a tiny size."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture(name="runs", scope="module")
def benchmark(load_benchmark):
    return load_benchmark("transformer_runs")


@pytest.mark.parametrize("task", ["packages", pytest.param("characters", marks=pytest.mark.slow)])
def test_texts_are_the_same_in_every_call_and_test_data_are_others(runs, task):
    first, second = (runs.data(task, 40, False) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    x, y, x_test, _ = first
    assert len(x) == len(y) == 40
    trained_on = {row.tobytes() for row in runs.data(task, None, False)[0]}
    seen = np.mean([row.tobytes() in trained_on for row in x_test])
    assert seen < 0.1  # the same licence stands in several files


def test_the_next_character_is_the_answer(runs):
    x, y, _, _ = runs.data("characters", 5, False)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def test_validation_data_are_training_data_that_are_held_out(runs):
    x, _, x_test, _ = runs.data("digits", 100, True)
    whole = runs.data("digits", 100, False)[0]
    np.testing.assert_array_equal(np.concatenate([x, x_test]), whole)
    assert len(x_test) == 20


@pytest.mark.parametrize("task", ["digits", "packages", "characters"])
def test_the_narrow_network_is_the_widest_within_the_budget(runs, task):
    pytest.importorskip("keras_hub")
    runs.FLAGS.hidden = 24
    width = runs.narrow_width(task, 0.5)
    cost, limit = (runs.kp.inspect(runs.network(task, w)).macs for w in (width, 24))
    assert cost <= 0.5 * limit < runs.kp.inspect(runs.network(task, width + 4)).macs


@pytest.mark.timeout(600)
def test_a_pruned_run_is_exported_and_recorded(runs, tmp_path):
    pytest.importorskip("keras_hub")
    asked = "--tasks=digits --methods=pruned --budgets=0.5 --hidden=8 --epochs=3 --examples=64"
    runs.FLAGS(["x", *asked.split(), "--batch_size=32", f"--output={tmp_path}"])
    runs.main([])
    (line,) = (tmp_path / "transformers.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert 0 < record["macs"] <= 0.5
    assert 0 <= record["error"] <= 1
    assert record["bytes"] > 0
