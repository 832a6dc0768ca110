"""The program from outside: quiet, without a traceback when it is interrupted in its imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.fspath(ROOT)}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )


def test_program_prints_nothing_but_its_own():
    done = python("-m", "kfacprune", "--version", stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "tensorflow 2." in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_during_the_imports_is_one_line():
    code = """
import os, signal, time, kfacprune
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
with kfacprune._interruptible(), kfacprune._quiet():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    done = python("-c", code)
    assert done.returncode == 130
    assert done.stderr == "kfacprune: interrupted; nothing was written.\n"


def test_what_native_code_prints_is_kept_back_unless_the_start_fails():
    code = """
import os, kfacprune
with kfacprune._quiet():
    os.write(2, b"noise of a success")
with kfacprune._quiet():
    os.write(2, b"why it fails\\n")
    raise ImportError("no library")
"""
    done = python("-c", code)
    assert "noise of a success" not in done.stderr
    assert done.stderr.startswith("why it fails\n")
    assert done.stderr.endswith("ImportError: no library\n")


def test_warning_is_one_line():
    code = """
import warnings, kfacprune
warnings.showwarning = kfacprune._show_warning
warnings.warn("one\\n  two")
"""
    assert python("-c", code).stderr == "kfacprune: warning: one two\n"
