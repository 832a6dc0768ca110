"""The page on deployment: tables are made from the records, examples name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import tf_kfacprune as kp

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deploy.md"


def test_every_name_on_the_page_exists():
    text = PAGE.read_text(encoding="utf-8")
    for module, name in set(re.findall(r"kp\.(export|tfmot)\.(\w+)", text)):
        assert hasattr(getattr(kp, module), name), name


def test_latencies_make_rows_of_sizes_and_of_times(generate, results):
    rows = [
        {
            "model": model,
            "quantization": quantization,
            "threads": 1,
            "size": {"raw": 1000 * size, "gzip": 900 * size},
            "activations": 64,
            "microseconds": 40.0 * size,
            "ratio": size / 4,
            "macs_ratio": size / 8,
            "time_per_macs": 2.0,
        }
        for model, quantization, size in [("dense", None, 4), ("compact", None, 1)]
    ]
    record = {"key": {"network": "net"}, "rows": rows}
    (results / "deploy_latency.jsonl").write_text(json.dumps(record) + "\n")
    last = generate.TABLES["deploy_sizes"]().splitlines()[-1]
    assert last == "| net | float32 | 4,000 | 1,000 | 900 | 64 |"
    last = generate.TABLES["deploy_times"]().splitlines()[-1]
    assert last == "| net | 1 | 160 | 0.125 | 0.250 | - | - | - | - | 2.0 |"


def test_failures_are_shown_beside_what_works(generate, results):
    formats = {"float32": {"accuracy": 0.5}, "int8": {"accuracy": 0.496}}
    network = {"key": {"network": "net", "epochs": 3, "examples": None}, "formats": formats}
    network |= {"weights": 1234, "keras_accuracy": 0.5}
    (results / "deploy_networks.jsonl").write_text(json.dumps(network) + "\n")
    last = generate.TABLES["deploy_accuracy"]().splitlines()[-1]
    assert last == (
        "| net | 3 x all | 1,234 | 50.00 % | +0.00 | failed | failed | -0.40 | failed |"
    )
    works = {"compact_params": 2_000_000, "agrees": True, "rms_error": 1e-6, "bytes": 8_000_000}
    fails = {"compact_params": 2_000_000, "agrees": False, "message": "no a|b\nlog"}
    keys = [{"model": "Net", "quantization": name} for name in (None, "int8")]
    lines = [json.dumps({"key": k} | v) for k, v in zip(keys, (works, fails), strict=True)]
    (results / "deploy_applications.jsonl").write_text("\n".join(lines) + "\n")
    last = generate.TABLES["deploy_applications"]().splitlines()[-1]
    assert last == "| `Net` | 2.0M | 1.0e-06 | 8.0 MB | no a\\|b |  |"
