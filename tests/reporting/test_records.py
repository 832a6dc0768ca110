"""The JSON record: complete, readable, and written whole."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.reporting import Comparison, ModelFigures, record, versions, write_json_atomic
from tf_kfacprune.reporting.records import command_line

COMPARISON = Comparison(
    ModelFigures({"fc": 4}, params=100, macs=80, accuracy=0.9),
    ModelFigures({"fc": 2}, params=50, macs=20, accuracy=0.89),
    kept={"fc": [0, 3]},
)


def test_record_says_what_was_asked_what_was_reached_and_how_to_make_it_again():
    content = record(
        COMPARISON,
        data="digits",
        seed=0,
        budget={"macs": 0.3},
        command=["python", "train.py", "--name=a b"],
        epochs=4,
    )
    assert content["budget"] == {
        "asked": {"macs": 0.3},
        "achieved": {"macs": 0.25, "params": 0.5},
        "reasons": {},
    }
    assert content["kept_neurons"] == {"fc": [0, 3]}
    assert content["compact"]["accuracy"] == 0.89
    assert content["command"] == "python train.py '--name=a b'"
    assert content["epochs"] == 4
    assert content["versions"]["keras"].startswith("3.")


def test_command_of_this_process_has_no_path_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for program, shown in [
        (str(tmp_path / "examples" / "train.py"), "python examples/train.py"),
        ("examples/train.py", "python examples/train.py"),
        ("/elsewhere/bin/kfacprune", "kfacprune"),
    ]:
        monkeypatch.setattr(sys, "argv", [program, "--seed=0"])
        assert record(COMPARISON, data="digits", seed=0)["command"] == f"{shown} --seed=0"


def test_a_notebook_has_no_command_line(monkeypatch):
    for program in ("", "-c", "/usr/lib/python3/site-packages/ipykernel_launcher.py"):
        monkeypatch.setattr(sys, "argv", [program, "-f", "kernel.json"])
        assert command_line() is None
    monkeypatch.setattr(sys, "argv", ["train.py", "--name=a b"])
    assert command_line() == "python train.py '--name=a b'"


def test_names_of_the_record_are_not_overwritten():
    with pytest.raises(InvalidArgumentError, match=r"\['versions'\]"):
        record(COMPARISON, data="digits", seed=0, **{"versions": 1})


def test_versions_name_what_is_not_installed(monkeypatch):
    from tf_kfacprune.reporting import records

    monkeypatch.setattr(records, "_PACKAGES", ("numpy", "no-such-package"))
    found = versions()
    assert found["numpy"] == np.__version__
    assert found["no-such-package"] == "not installed"


def test_json_is_indented_with_number_lists_on_one_line(tmp_path):
    content = {"kept": list(range(-3, 300)), "e": [1e-7, 2.5], "s": ["a", "b"], "n": np.float32(2)}
    path = write_json_atomic(tmp_path / "record.json", content | {"a": np.arange(2), "p": tmp_path})
    text = path.read_text()
    assert json.loads(text) == content | {"n": 2.0, "a": [0, 1], "p": str(tmp_path)}
    assert len(text.splitlines()) == 11
    assert '  "a": [0, 1],\n' in text


@pytest.mark.parametrize("value", [float("nan"), np.inf, object(), {1: {2, 3}}])
def test_value_that_json_cannot_hold_leaves_nothing(tmp_path, value):
    with pytest.raises(InvalidArgumentError, match=r"record\.json.*JSON"):
        write_json_atomic(tmp_path / "record.json", {"value": value})
    assert os.listdir(tmp_path) == []


def test_existing_record_is_refused(tmp_path):
    path = write_json_atomic(tmp_path / "record.json", {"run": 1})
    with pytest.raises(ExportError, match="already exists"):
        write_json_atomic(path, {"run": 2})
    write_json_atomic(path, {"run": 2}, overwrite=True)
    assert json.loads(path.read_text()) == {"run": 2}
