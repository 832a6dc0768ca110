"""Every constructor of keras.applications: `pytest -m slow` runs them all, records are checked."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import keras
import pytest

RECORDS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results" / "applications.jsonl"
CONSTRUCTORS = dict(inspect.getmembers(keras.applications, inspect.isfunction))


def _check(record):
    assert record["open_gates_change"] == 0.0
    assert record["counts_all_parameters"]
    assert record["prunable_share"] == 1.0, record["frozen"]
    for kind in ("hard", "soft", "branches"):
        if kind in record:
            assert record[kind]["error"] <= 1e-5
            assert record[kind]["effect"] > 1e-2
            assert record[kind]["params"] < 0.9
    assert record["tflite"]["bytes"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(CONSTRUCTORS))
def test_the_compact_model_equals_the_gated_one(name, load_benchmark):
    applications = load_benchmark("applications")
    _check(applications.examine(name, CONSTRUCTORS[name], size=96))


def test_the_recorded_models_pass():
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    assert records
    for record in records:
        assert record["key"]["model"] in CONSTRUCTORS
        _check(record)
