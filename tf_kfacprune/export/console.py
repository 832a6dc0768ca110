"""Keeps what native code prints to file descriptors 1 and 2 out of the user's terminal.

It is not lost: when an export fails, the log is kept in a file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_kfacprune.errors import ExportError

__all__ = ["ConsoleLog", "captured_console", "log_kept_on_error"]

_LINES_SHOWN = 15


@dataclass
class ConsoleLog:
    """What was printed inside `captured_console` blocks, available after them."""

    text: str = ""
    started: bool = False

    @property
    def tail(self) -> str:
        """The last lines, for an error message."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return "\n".join(lines[-_LINES_SHOWN:]) or "(nothing was printed)"


@contextmanager
def captured_console(log: ConsoleLog | None = None) -> Iterator[ConsoleLog]:
    """Collects standard output and standard error of the whole process, native code included.

    The TFLite converter prints from C++, which redirecting ``sys.stdout`` does not reach: the file
    descriptors themselves are redirected. A logger that is set up inside the block keeps the stream
    that it finds there (absl sets up the root logger when TensorFlow writes a SavedModel); after
    the block that stream leads to where ``sys.stdout`` or ``sys.stderr`` led before it.

    Args:
        log: the log to add to; a new one by default.

    Yields:
        A log that is filled when the block ends, by an error too.
    """
    log = ConsoleLog() if log is None else log
    log.started = True
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            try:
                # In a notebook, sys.stdout does not end at a file descriptor.
                with (
                    os.fdopen(os.dup(sink.fileno()), "w", encoding="utf-8") as text,
                    _diverted(sys.stdout, text) as output,
                    _diverted(sys.stderr, text) as errors,
                    redirect_stdout(output),
                    redirect_stderr(errors),
                ):
                    yield log
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(saved[0], 1)
                os.dup2(saved[1], 2)
                sink.seek(0)
                log.text += sink.read().decode(errors="replace")
    finally:
        for descriptor in saved:
            os.close(descriptor)


class _Stream:
    """Stands for a text stream whose target changes while others hold it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    # Methods of its own, so that a kept ``stream.write`` follows the target, too.
    def write(self, text: str) -> int:
        return int(self.target.write(text))

    def writelines(self, lines: Iterable[str]) -> None:
        self.target.writelines(lines)

    def flush(self) -> None:
        self.target.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


@contextmanager
def _diverted(stream: Any, text: Any) -> Iterator[_Stream]:
    """A stream that leads to ``text`` during the block, and to ``stream`` ever after."""
    diverted = _Stream(text)
    try:
        yield diverted
    finally:
        diverted.target = stream


@contextmanager
def log_kept_on_error(target: str | os.PathLike[str]) -> Iterator[ConsoleLog]:
    """Adds to an `ExportError` of the block where the log was kept.

    The log goes to the folder for temporary files: beside the target nothing may be left behind.
    An error before anything could be logged keeps none.

    Args:
        target: what is being written.

    Yields:
        The log, for the block to fill.

    Raises:
        ExportError: the block's own, with the name of the file at its end.
    """
    log = ConsoleLog()
    try:
        yield log
    except ExportError as error:
        if not log.started:
            raise
        name = f"tf_kfacprune_{Path(target).name}_"
        descriptor, file = tempfile.mkstemp(prefix=name, suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"{os.fspath(target)}\n\n{error}\n\nPrinted on the way:\n{log.text}")
        raise ExportError(f"{error} The log is kept in {file}.") from error
