"""Backbones of keras_hub: some families run, the records of all are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECORDS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results" / "hub.jsonl"


@pytest.fixture(name="hub", scope="module")
def hub_benchmark(load_benchmark):
    pytest.importorskip("keras_hub")
    return load_benchmark("hub")


def check(record):
    if record.get("neurons"):
        assert record["open_gates_change"] == 0.0
        for kind in ("hard", "soft"):
            assert record[kind]["error"] <= 1e-5
            assert record[kind]["effect"] > 1e-2
            assert record[kind]["params"] < 1.0


@pytest.mark.parametrize(
    ("name", "share"),
    [("Bert", 1.0), ("GPT2", 1.0), ("Llama", 0.9), ("MobileNet", 1.0), ("ViT", 1.0)],
)
def test_a_backbone_is_pruned_exactly(hub, name, share):
    record = hub.examine(name)
    check(record)
    assert record["prunable_share"] >= share, record["frozen"]
    assert not record["opaque"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_backbones(hub):
    for name in hub.BACKBONES:
        check(hub.examine(name))


@pytest.mark.skipif(not RECORDS.exists(), reason="nothing is recorded yet")
def test_the_recorded_backbones_pass():
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    assert sum(bool(record.get("neurons")) for record in records) >= 0.95 * len(records)
    for record in records:
        assert "failed" not in record, record
        check(record)
