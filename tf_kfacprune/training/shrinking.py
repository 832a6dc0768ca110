"""Trains a settled network through a compact copy, so that closed neurons cost nothing any more."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np

from tf_kfacprune.compaction import WorkingCopy
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.training.compiled import inner_optimizer

__all__ = ["ShrinkingCallback", "Shrunk", "can_shrink"]

# Tracing the training step of the copy takes seconds, which have to pay.
_LEAST_STEPS = 1000
_LARGEST_FRACTION = 0.6


class Shrunk:
    """A compact copy of a settled `PrunableModel`, and what trains it; plain, so not tracked.

    Attributes:
        trainer: A `PrunableModel` without gates around the copy, compiled like the model.

    Args:
        model: The model, compiled and settled.

    Raises:
        UnsupportedModelError: If no such copy can be made.
    """

    def __init__(self, model: Any) -> None:
        self._copy = WorkingCopy(model.gated)
        self.trainer = type(model)(
            self._copy.net,
            curvature=model.curvature,
            max_skipped_steps=model.max_skipped_steps,
            seed=model.seed,
        )
        # Skipped steps are counted, and labels drawn, in one place.
        self.trainer.guard = model.guard
        self.trainer.seed_generator = model.seed_generator
        optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
        loss, args, kwargs = model.compile_arguments
        self.trainer.compile(optimizer, loss, *args, **kwargs)

    def fetch(self) -> None:
        """Takes the weights of the network."""
        self._copy.fetch()

    def write_back(self) -> None:
        """Puts the weights into the network."""
        self._copy.write_back()

    def state(self) -> list[np.ndarray]:
        """Everything that training goes on from: optimizer, penalty, noise."""
        return [np.array(keras.ops.convert_to_numpy(v)) for v in self._variables()]

    def restore(self, state: list[np.ndarray]) -> None:
        """Goes on from a state; one of another optimizer is passed over."""
        variables = self._variables()
        if [tuple(v.shape) for v in variables] == [value.shape for value in state]:
            for variable, value in zip(variables, state, strict=True):
                variable.assign(value)

    def _variables(self) -> list[keras.Variable]:
        metrics = {id(v) for metric in self.trainer.metrics for v in metric.variables}
        own = [v for v in self.trainer.variables if id(v) not in metrics]
        return [*own, *self.trainer.optimizer.variables]


def can_shrink(model: Any, steps_left: int) -> bool:
    """Whether training goes on through a compact copy.

    That is not so before gates have settled, nor where it would not pay (few steps left, or most
    of the network kept), unless the run was on a copy before it was resumed; with several replicas;
    or with an optimizer whose hyper-parameters follow its count of steps, that averages weights or
    that excludes variables from weight decay, because the copy has an optimizer of its own.

    Args:
        model: A compiled `PrunableModel`.
        steps_left: Steps that are left of the run.
    """
    controller = model.controller
    if controller is None or model.gated is None or not model.shrink:
        return False
    if model.budget.is_open or not controller.has_settled:
        return False
    pays = steps_left >= _LEAST_STEPS and float(controller.fraction("macs")) <= _LARGEST_FRACTION
    optimizer = inner_optimizer(model.optimizer)
    starts_anew = model.constant_learning_rate is not None and not optimizer.use_ema
    excludes = any(
        getattr(optimizer, f"_exclude_from_weight_decay{kind}", None) for kind in ("", "_pattern")
    )
    follows_steps = any(isinstance(v, dict) for v in optimizer.get_config().values())
    return (
        (pays or model.was_shrunk)
        and starts_anew
        and not follows_steps
        and not excludes
        and model.distribute_strategy.num_replicas_in_sync == 1
    )


class ShrinkingCallback(keras.callbacks.Callback):
    """Moves training to the copy at the beginning of an epoch, and its weights back at the end."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        model = self.model
        steps_left = (self.params["epochs"] - epoch) * self.params["steps"]
        if model.shrunk is None and can_shrink(model, steps_left):
            try:
                model.start_shrunk()
            except UnsupportedModelError as error:
                model.shrink = False
                warnings.warn(
                    f"Model {model.name!r} is trained on at its full size: {error}", stacklevel=2
                )
        if model.shrunk is not None:
            model.shrunk.fetch()  # a callback may have changed them
            model.shrunk.trainer.reset_metrics()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._write_back()

    def on_test_begin(self, logs: Any = None) -> None:
        self._write_back()

    def on_train_end(self, logs: Any = None) -> None:
        self._write_back()
        self.model.stop_shrunk()

    def _write_back(self) -> None:
        if self.model.shrunk is not None:
            self.model.shrunk.write_back()
