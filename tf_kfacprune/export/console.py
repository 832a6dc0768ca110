"""Keeps what native code prints to file descriptors 1 and 2 out of the user's terminal."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["ConsoleLog", "captured_console"]

_LINES_SHOWN = 15


@dataclass
class ConsoleLog:
    """What was printed inside a `captured_console` block, available after it."""

    text: str = ""

    @property
    def tail(self) -> str:
        """The last lines, for an error message."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return "\n".join(lines[-_LINES_SHOWN:]) or "(nothing was printed)"


@contextmanager
def captured_console() -> Iterator[ConsoleLog]:
    """Collects standard output and standard error of the whole process, native code included.

    The TFLite converter prints from C++, which redirecting ``sys.stdout`` does not reach: the file
    descriptors themselves are redirected.

    Yields:
        A log that is filled when the block ends, by an error too.
    """
    log = ConsoleLog()
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            try:
                yield log
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(saved[0], 1)
                os.dup2(saved[1], 2)
                sink.seek(0)
                log.text = sink.read().decode(errors="replace")
    finally:
        for descriptor in saved:
            os.close(descriptor)
