"""Native output is collected, also when the block fails, and the terminal comes back."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.console import captured_console, log_kept_on_error


def test_native_and_python_output_is_collected(capfd):
    with captured_console() as log:
        os.write(1, b"native out\n")
        os.write(2, b"native err\n")
        print("python out")
    os.write(1, b"after\n")
    assert "native out" in log.text
    assert "native err" in log.text
    assert "python out" in log.text
    assert capfd.readouterr() == ("after\n", "")


def test_log_is_there_when_the_block_fails(capfd):
    with pytest.raises(OverflowError), captured_console() as log:
        os.write(os.write(2, b"the reason\n") << 64, b"no such descriptor")
    assert log.tail == "the reason"
    assert capfd.readouterr() == ("", "")


def test_tail_has_the_last_lines_only():
    with captured_console() as log:
        os.write(1, "".join(f"line {i}\n\n" for i in range(100)).encode())
    assert log.tail.splitlines() == [f"line {i}" for i in range(85, 100)]
    with captured_console() as log:
        pass
    assert log.tail == "(nothing was printed)"


def fail_after_printing(log):
    with captured_console(log):
        os.write(2, b"what the converter said")
    raise ExportError("It does not agree.")


def test_log_of_a_failed_export_is_kept_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with (
        pytest.raises(
            ExportError, match=r"^It does not agree\. The log is kept in \S+\.$"
        ) as caught,
        log_kept_on_error("runs/net.tflite") as log,
    ):
        fail_after_printing(log)
    file = Path(re.search(r"kept in (\S+)\.$", str(caught.value))[1])
    assert file.parent == tmp_path
    for part in ("runs/net.tflite", "It does not agree.", "what the converter said"):
        assert part in file.read_text()


def test_no_log_is_kept_before_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ExportError, match=r"^It exists\.$"), log_kept_on_error("net.tflite"):
        raise ExportError("It exists.")
    assert not list(tmp_path.iterdir())
