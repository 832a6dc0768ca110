"""The one callback that every `fit` gets: it tells the model where the run stands."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["RunCallback"]


class RunCallback(keras.callbacks.Callback):
    """Calls the model at the beginning and end of runs and epochs, and its guard in between."""

    def on_train_begin(self, logs: Any = None) -> None:
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        self.model.begin_run(int(epochs) * int(steps) if steps else None)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._checked = -1
        steps = self.params.get("steps")
        self.model.begin_epoch((self.params["epochs"] - epoch) * steps if steps else None)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Reading a counter waits for the device: once per `limit` steps is often enough.
        if batch - self._checked >= self.model.guard.limit:
            self.model.guard.check()
            self._checked = batch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.guard.check()
        self.model.end_epoch()

    def on_test_begin(self, logs: Any = None) -> None:
        self.model.end_epoch()

    def on_train_end(self, logs: Any = None) -> None:
        self.model.end_run()
