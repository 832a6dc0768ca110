"""Looks at the step guard now and then: what a training step cannot do, raising an error."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["GuardCallback"]


class GuardCallback(keras.callbacks.Callback):
    """Ends the training when too many steps in a row were skipped."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._checked = -1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Reading a counter waits for the device: once per `limit` steps is often enough.
        if batch - self._checked >= self.model.guard.limit:
            self.model.guard.check()
            self._checked = batch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.guard.check()
