"""Native output is collected, also when the block fails, and the terminal comes back."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
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


def test_streams_kept_from_inside_lead_to_the_terminal_afterwards(capfd):
    """Loggers bind the stream that they find; so do functions that keep ``sys.stderr.write``."""
    with captured_console() as log:
        handler = logging.StreamHandler()
        write, stream = sys.stdout.write, sys.stderr
        handler.emit(logging.makeLogRecord({"msg": "inside"}))
        write("inside, too\n")
    assert log.text.split("\n")[:2] == ["inside", "inside, too"]
    handler.emit(logging.makeLogRecord({"msg": "after"}))
    write("after, too\n")
    stream.writelines(["the last\n"])
    stream.flush()
    assert not stream.closed
    assert capfd.readouterr() == ("after, too\n", "after\nthe last\n")


def test_streams_of_nested_blocks_lead_outwards(capfd):
    with captured_console() as outer:
        with captured_console() as inner:
            print("first")
            stream = sys.stdout
        stream.write("second\n")
    stream.write("third\n")
    assert (inner.text, outer.text) == ("first\n", "second\n")
    assert capfd.readouterr() == ("third\n", "")


@pytest.mark.slow
def test_tensorflows_logger_works_after_an_export(tmp_path):
    """In a process of its own: absl sets up the root logger once, when a SavedModel is written."""
    program = """
        import sys, keras, tensorflow as tf, tf_kfacprune as kp
        net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        kp.export.tflite(net, sys.argv[1], verify=False)
        tf.get_logger().warning("a later warning")
        """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "net.tflite"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a later warning" in done.stderr
    assert "Logging error" not in done.stderr
