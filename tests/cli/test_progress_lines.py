"""How a training shows what it has done: in a terminal of any width, and in a log."""

import re
from types import SimpleNamespace

import pytest

from tf_kfacprune.cli.progress_lines import ProgressLines, wrapped

FIGURES = {"accuracy": 0.5, "loss": 0.123456, "macs": 1.0, "neurons": 224.0, "skipped_steps": 0.0}


@pytest.fixture
def run_epoch(monkeypatch):
    """Runs an epoch of 4 steps of 25 seconds each, of which 100 were done before."""

    def run(is_live, columns=80, figures=FIGURES):
        now = [0.0]
        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr("tf_kfacprune.cli.progress_lines.time", clock)
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = ProgressLines(SimpleNamespace(start=100, steps=104), is_live=is_live)
        lines.set_params({"epochs": 30})
        lines.on_epoch_begin(2)
        for batch in range(4):
            now[0] += 25.0
            lines.on_train_batch_end(batch, figures)
        lines.on_epoch_end(2, figures)

    return run


def test_a_log_has_a_line_a_minute_and_one_for_every_epoch(run_epoch, capsys):
    run_epoch(is_live=False)
    assert capsys.readouterr().out == (
        "Epoch 3/30, step 103/104 - accuracy: 0.5 - loss: 0.1235 - macs: 1 - neurons: 224\n"
        "Epoch 3/30, 4 steps in 100.0 s - accuracy: 0.5 - loss: 0.1235 - macs: 1 - neurons: 224\n"
    )


def test_skipped_steps_are_told_of(run_epoch, capsys):
    run_epoch(is_live=False, figures={**FIGURES, "skipped_steps": 2.0})
    assert capsys.readouterr().out.count(" - skipped_steps: 2\n") == 2


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_no_line_in_a_terminal_is_broken_by_it(run_epoch, capsys, monkeypatch, columns):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run_epoch(is_live=True, columns=columns)
    shown = capsys.readouterr().out
    *live, end = shown.split("\r\x1b[K")[1:]
    assert len(live) == 4
    for line in [*live, *end.splitlines()]:
        assert 0 < len(line) < columns
    assert "\n" not in "".join(live)
    for number, line in zip(range(101, 105), live, strict=True):
        assert line.startswith(f"Epoch 3/30, step {number}/104"[: columns - 1])
    whole = re.sub(r"\n  ", " - ", end)
    assert whole.endswith("accuracy: 0.5 - loss: 0.1235 - macs: 1 - neurons: 224\n")


def test_prose_is_broken_between_words_in_a_terminal_only(capsys, monkeypatch):
    text = "word " * 40
    assert wrapped(text) == text
    monkeypatch.setenv("COLUMNS", "41")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert wrapped(text).splitlines() == ["word " * 7 + "word"] * 5
