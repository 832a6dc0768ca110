"""Native output is collected, also when the block fails, and the terminal comes back."""

from __future__ import annotations

import os

import pytest

from tf_kfacprune.export.console import captured_console


def test_native_and_python_output_is_collected(capfd):
    with captured_console() as log:
        os.write(1, b"native out\n")
        os.write(2, b"native err\n")
    os.write(1, b"after\n")
    assert "native out" in log.text
    assert "native err" in log.text
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
