"""What a pruning `fit` does in Python: plan the phases at the start, say so if they did not end."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["PhasesCallback"]


class PhasesCallback(keras.callbacks.Callback):
    """Added by `PrunableModel.fit`; everything per step happens inside the training step."""

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        if model.controller is None:
            return
        epochs, steps = self.params.get("epochs"), self.params.get("steps")
        if not steps:
            raise InvalidArgumentError(
                "PrunableModel.fit must know the number of steps to lay out its phases, and the "
                "data do not tell. Received: steps_per_epoch=None. Pass `steps_per_epoch=...`."
            )
        rate = model.constant_learning_rate
        first_rate = model.controller.plan(int(epochs) * int(steps), rate)
        if first_rate is not None:
            warnings.warn(
                f"{model.name!r} has finished a run, which left a learning rate of {rate:.2g} of "
                f"{first_rate:.2g}: hardly anything will be trained. Set "
                "`model.optimizer.learning_rate`, compile again, or go on with the same run by "
                "`fit(epochs=more, initial_epoch=done)`.",
                stacklevel=2,
            )

    def on_train_end(self, logs: Any = None) -> None:
        controller = self.model.controller
        if controller is not None and not controller.has_settled:
            warnings.warn(
                f"Training of {self.model.name!r} ended before its gates settled: the network is "
                "not on its budget. Go on with `fit(..., initial_epoch=...)`.",
                stacklevel=2,
            )
