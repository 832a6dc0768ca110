"""Lines about long epochs, for logs; a terminal has a progress bar."""

from __future__ import annotations

import time
from typing import Any

import keras

from tf_kfacprune.cli.batches import EpochBatches

__all__ = ["StepLines"]


class StepLines(keras.callbacks.Callback):
    """Prints how far an epoch has come, now and then; nothing where epochs are shorter than that.

    Args:
        batches: The data of the epochs.
        seconds: Least time between two lines.
    """

    def __init__(self, batches: EpochBatches, seconds: float = 60.0) -> None:
        super().__init__()
        self._batches = batches
        self._seconds = seconds

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._first = epoch, self._batches.start
        self._last = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        figures = [f"{name}: {float(value):.4g}" for name, value in (logs or {}).items()]
        done = f"{self._first + batch + 1}/{self._batches.steps}"
        print(
            f"Epoch {self._epoch + 1}/{self.params['epochs']}, step {done}",
            *figures,
            sep=" - ",
            flush=True,
        )
