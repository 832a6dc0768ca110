"""How far a training has come: a line that is rewritten in a terminal, or lines for a log."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import keras

from tf_kfacprune.cli.batches import EpochBatches

__all__ = ["ProgressLines", "fresh_line", "wrapped"]

_LIVE_SECONDS, _LOG_SECONDS = 0.2, 60.0


class ProgressLines(keras.callbacks.Callback):
    """Prints a line at the end of every epoch, and says in between how far it has come.

    In a terminal that is one line, which is rewritten. It has as many figures as fit: a line that
    is broken by the terminal can only be rewritten from its last break on. (The bar of Keras
    fills a terminal of 80 columns with remains.) A log has a line now and then.

    Args:
        batches: The data of the epochs.
        is_live: Whether the lines are shown in a terminal.
    """

    def __init__(self, batches: EpochBatches, is_live: bool) -> None:
        super().__init__()
        self._batches = batches
        self._is_live = is_live
        self._seconds = _LIVE_SECONDS if is_live else _LOG_SECONDS

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._first = self._batches.start
        self._name = f"Epoch {epoch + 1}/{self.params['epochs']}"
        self._begin = self._last = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        done = f"{self._name}, step {self._first + batch + 1}/{self._batches.steps}"
        lines = [done, *_figures(logs)]
        if self._is_live:
            shown = f"{fresh_line(sys.stdout)}{_joined(lines, _columns())[0]}"
            print(shown, end="", flush=True)
        else:
            print(*lines, sep=" - ", flush=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        seconds = time.monotonic() - self._begin
        steps = self._batches.steps - self._first
        parts = [f"{self._name}, {steps} steps in {seconds:.1f} s", *_figures(logs)]
        if self._is_live:
            print(fresh_line(sys.stdout), end="")
            print(*_joined(parts, _columns()), sep="\n  ", flush=True)
        else:
            print(*parts, sep=" - ", flush=True)


def fresh_line(stream: TextIO) -> str:
    """What clears the line of a terminal on which a training may have shown its state."""
    return "\r\x1b[K" if stream.isatty() else ""


def wrapped(text: str) -> str:
    """Text for standard output, broken between words if that is a terminal."""
    return textwrap.fill(text, _columns()) if sys.stdout.isatty() else text


def _columns() -> int:
    """Columns of the terminal, but one: in the last one some break the line at once."""
    return shutil.get_terminal_size().columns - 1


def _figures(logs: Mapping[str, float] | None) -> list[str]:
    """Every figure with its name; skipped steps only if there are any."""
    return [
        f"{name}: {float(value):.4g}"
        for name, value in (logs or {}).items()
        if name != "skipped_steps" or value
    ]


def _joined(parts: Sequence[str], columns: int) -> list[str]:
    """Lines of whole parts, the second and later ones to be indented by two; never none."""
    lines = [parts[0][:columns]]
    for part in parts[1:]:
        indent = 2 if len(lines) > 1 else 0
        if indent + len(lines[-1]) + len(part) + 3 <= columns:
            lines[-1] += f" - {part}"
        else:
            lines.append(part)
    return lines
