"""The program `kfacprune`: a quiet start, before TensorFlow is imported.

It is apart from the package because importing any part of that imports TensorFlow, which takes
seconds, prints lines about the machine from C++, and answers Ctrl-C with a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

__all__ = ["run"]

_EXIT_INTERRUPTED, _EXIT_BROKEN_PIPE = 130, 141  # 128 + the signal, as shells have it


def run() -> None:
    """Runs the program with the arguments of this process and exits with its status."""
    # Warnings and errors of TensorFlow's C++ code, without its remarks; the user's own value wins.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _interruptible(), _quiet():
        from tf_kfacprune.cli.main import main, start_devices

        start_devices()
    warnings.showwarning = _show_warning
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:  # between two commands' own handlers
        status = _EXIT_INTERRUPTED
    sys.exit(status)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once: there is nothing to clear up yet.

    An exception in the middle of the imports would come out as one of many others.
    """
    stderr = os.dup(2)

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        os.write(stderr, b"kfacprune: interrupted; nothing was written.\n")
        os._exit(128 + number)

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what native code prints to standard error, and shows it only if the block fails."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            os.dup2(saved, 2)
            kept.seek(0)
            os.write(2, kept.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning in one line, without the place in the code."""
    del category, filename, lineno, line
    stream = file or sys.stderr
    fresh = "\r\x1b[K" if stream.isatty() else ""  # a training may show its state on the line
    print(f"{fresh}kfacprune: warning: {' '.join(str(message).split())}", file=stream)


if __name__ == "__main__":
    run()
