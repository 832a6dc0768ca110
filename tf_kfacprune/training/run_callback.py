"""The one callback that every `fit` gets: it tells the model where the run stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tf_kfacprune.errors import DataError
from tf_kfacprune.training.best_epochs import BestEpochs
from tf_kfacprune.training.learning_rates import OverwrittenRates, sets_learning_rate

__all__ = ["FitCall", "RunCallback", "acts_on_batches"]

_Callback = keras.callbacks.Callback
_HARMLESS = ("keras.", "tf_kfacprune.")


@dataclass(frozen=True)
class FitCall:
    """What a call of `fit` says of itself.

    Attributes:
        epoch_steps: Steps of one epoch, or None if the data do not tell.
        epochs: Epochs of the run, those before a resume included.
        initial_epoch: Epochs that were done before.
        sets_rate: Whether a callback is there to set the learning rate.
        callbacks_act_on_batches: Whether one may read or change weights between batches.
    """

    epoch_steps: int | None
    epochs: int = 1
    initial_epoch: int = 0
    sets_rate: bool = False
    callbacks_act_on_batches: bool = False

    @property
    def is_one_epoch(self) -> bool:
        """Whether it trains for one epoch only."""
        return self.epochs - self.initial_epoch == 1

    @property
    def total_steps(self) -> int | None:
        """Steps of the run, those done before a resume included; None if unknown."""
        return self.epoch_steps * self.epochs if self.epoch_steps else None


def acts_on_batches(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback may read or change weights between batches; Keras' own do not."""
    kind = type(callback)
    if kind.__module__.startswith(_HARMLESS) and kind is not keras.callbacks.LambdaCallback:
        return False
    return any(
        getattr(getattr(callback, name), "__func__", None) is not getattr(_Callback, name)
        for name in ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
    )


class RunCallback(keras.callbacks.Callback):
    """Calls the model at the beginning and end of runs and epochs, and its guard in between.

    It comes before all other callbacks, so that they find everything as it should be.

    Args:
        callbacks: The other callbacks.
        initial_epoch: As `fit` was given it.
    """

    def __init__(
        self, callbacks: Sequence[keras.callbacks.Callback] = (), initial_epoch: int = 0
    ) -> None:
        super().__init__()
        self._initial_epoch = initial_epoch
        self._sets_rate = sets_learning_rate(callbacks)
        self._callbacks_act_on_batches = any(acts_on_batches(callback) for callback in callbacks)
        self._best = BestEpochs(callbacks)
        self._rates = OverwrittenRates(callbacks)

    def on_train_begin(self, logs: Any = None) -> None:
        steps = self.params.get("steps")
        if steps == 0:
            raise DataError(
                f"{type(self.model).__name__}.fit: there is no batch in the data. Received: 0 "
                "examples, or steps_per_epoch=0. Expected: at least one."
            )
        self.model.begin_run(
            FitCall(
                int(steps) if steps else None,
                int(self.params["epochs"]),
                self._initial_epoch,
                self._sets_rate,
                self._callbacks_act_on_batches,
            )
        )
        self._rates.note(self.model.decaying_learning_rate)
        self._steps_before: int | None = self._steps_taken()

    def _steps_taken(self) -> int:
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._checked, self._is_first_batch = -1, True
        if self._steps_before not in (None, self._steps_taken()):
            self._rates.note(self.model.decaying_learning_rate)  # of a state that was restored
        self._steps_before = None
        steps = self.params.get("steps")
        self.model.begin_epoch((self.params["epochs"] - epoch) * steps if steps else None)
        self._best.begin_epoch(self.model.has_settled, self.model.is_settled_at_next_step)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._is_first_batch:  # what was set when the epoch began, or the one before ended
            self._rates.compare(self.model.decaying_learning_rate, self.model.name)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._is_first_batch and not self.model.has_settled:  # else the step has set it
            self._rates.compare(self.model.decaying_learning_rate, self.model.name)
        self._is_first_batch = False
        if self._best.judge_batches:
            self._best.before_judging(self.model.has_settled)
        # Reading a counter waits for the device: once per `limit` steps is often enough.
        if batch - self._checked >= self.model.guard.limit:
            self.model.guard.check()
            self._checked = batch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.guard.check()
        self.model.end_epoch()
        self._best.before_judging(self.model.has_settled)
        self._rates.note(self.model.decaying_learning_rate)

    def on_test_begin(self, logs: Any = None) -> None:
        self.model.end_epoch()

    def on_train_end(self, logs: Any = None) -> None:
        self.model.end_run()
        self._best.end(self.model.has_settled)
