"""Signals that end the program: at once, or where there is something to save, after the next step.

| signal | from | exit status |
| --- | --- | --- |
| SIGINT | Ctrl-C | 130 |
| SIGTERM | `kill`, a batch system | 143 |
| SIGHUP | the terminal is closed | 129 |

A signal that is ignored stays ignored (`nohup`, background jobs of a script).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "Stopping", "stop_signals"]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """The program was asked to stop.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def status(self) -> int:
        """Exit status of the program, as shells have it."""
        return 128 + self.number


class Stopping:
    """What a signal does at the moment; the first one can be put off, a second one cannot.

    Attributes:
        deferred: Whether somebody looks at `check` regularly.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._pending: int | None = None

    @property
    def is_asked_for(self) -> bool:
        """Whether a signal has come that was put off."""
        return self._pending is not None

    def check(self) -> None:
        """Stops now if a signal has come.

        Raises:
            Stopped: If so.
        """
        if self._pending is not None:
            raise Stopped(self._pending)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handles a signal.

        Raises:
            Stopped: Unless it is put off.
        """
        del frame
        if not self.deferred or self._pending is not None:
            raise Stopped(number)
        self._pending = number
        print(
            f"\n{signal.Signals(number).name}: stops after this step. Again to stop at once.",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Lets signals raise `Stopped` inside the block, so that everything is cleared up.

    Yields:
        What they do; by default they stop at once.
    """
    stopping, before = Stopping(), {}
    if threading.current_thread() is threading.main_thread():  # others cannot handle signals
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stopping.receive)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
