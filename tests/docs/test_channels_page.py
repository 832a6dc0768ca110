"""The page on channels: tables say what rules do, examples run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import keras

from tf_kfacprune.graph import ChannelRule, rule_for

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "channels.md"


def test_every_layer_in_the_table_has_a_rule_and_every_rule_says_what_it_does(generate):
    names = re.findall(r"`(\w+)`", generate.TABLES["layers"]())
    expected = {"Dense", "Conv2D", "Add", "LSTM", "GroupQueryAttention", "TimeDistributed"}
    assert expected <= set(names)
    for name in ("layers", "operations"):
        for row in generate.TABLES[name]().splitlines()[2:]:
            assert len(row.split("|")[2].strip()) > 20, row


def test_layers_that_are_not_in_the_table_have_no_rule(generate):
    table = generate.TABLES["layers"]()
    unlisted = keras.layers.Lambda(lambda x: x)
    assert "`Lambda`" not in table
    assert type(rule_for(unlisted)) is ChannelRule


def test_a_record_of_the_benchmark_makes_a_row(generate, results):
    record = {
        "key": {"model": "Tiny", "size": 96},
        "params": 1_230_000,
        "prunable_share": 0.987,
        "num_branches": 4,
        "hard": {"error": 2e-7},
        "soft": {"error": 3e-6},
        "branches": {"error": 1e-7},
        "seconds": {"analyze": 0.02, "inspect": 0.31, "compact_hard": 1.2, "compact_soft": 4.6},
        "tflite": {"bytes": 100},
    }
    path = results / "applications.jsonl"
    path.write_text(json.dumps({**record, "num_branches": 9}) + "\n" + json.dumps(record) + "\n")
    row = generate.TABLES["applications"]().splitlines()[-1]
    assert row == "| `Tiny` | 1.2M | 98.7 % | 4 | 3e-06 | 0.0 | 0.3 | 5 | yes |"


def test_checking_finds_a_stale_table(generate, monkeypatch, tmp_path, capsys):
    (tmp_path / "page.md").write_text("a\n<!-- table: layers -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(generate, "HERE", tmp_path)
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert "`Dense`" in (tmp_path / "page.md").read_text()
    assert "up to date" in capsys.readouterr().out


def test_the_example_of_a_rule_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "register_channel_rule" in block]
    names: dict = {}
    exec(compile(example, "channels.md", "exec"), names)
    kp, network = names["kp"], names["network"]
    pm = kp.PrunableModel(network, kp.Budget(params=0.5))
    pm.controller.land()
    small = kp.compact(pm)
    assert small.get_layer("affine").factor.shape == (small.get_layer("hidden").units,)
