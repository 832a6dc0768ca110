"""Trains a settled network through a compact copy, so that closed neurons cost nothing any more."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tf_kfacprune.compaction import WorkingCopy
from tf_kfacprune.curvature import CurvatureEstimator, SpectralRadius, find_blocks
from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty
from tf_kfacprune.training.trainee import Trainee, inner_optimizer

__all__ = ["Shrunk", "can_shrink"]

# Tracing the training step of the copy takes seconds, which have to pay.
_LEAST_STEPS = 1000
_LARGEST_FRACTION = 0.6


class Shrunk:
    """A compact copy of a settled network, and what trains it; a plain object, so not tracked.

    Attributes:
        trainee: The copy as training steps see it.

    Args:
        gated: The settled network.
        trainee: What has been trained so far; its optimizer is the one that callbacks know.
        curvature: The penalty on the curvature, or None.
        seed: What probes of the curvature are drawn with, a `keras.random.SeedGenerator`.

    Raises:
        UnsupportedModelError: If no such copy can be made.
    """

    def __init__(
        self, gated: GatedNetwork, trainee: Trainee, curvature: SpectralRadius | None, seed: Any
    ) -> None:
        self._copy = WorkingCopy(gated)
        net = self._copy.net
        found = find_blocks(net)
        penalty = None if curvature is None else CurvaturePenalty(curvature, found.blocks)
        if penalty is not None and trainee.penalty is not None:
            penalty.go_on_from(trainee.penalty)
        compiled = trainee.optimizer
        self.trainee = Trainee(
            net,
            net.trainable_variables,
            type(compiled).from_config(compiled.get_config()),
            found,
            CurvatureEstimator(net, trainee.estimator.objective, seed),
            penalty,
            follows=compiled,
        )
        self.trainee.bind_and_build()

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
        trainee = self.trainee
        weights = {id(v) for v in trainee.net.weights}
        noise = [v for v in trainee.net.variables if id(v) not in weights]
        of_penalty = [] if trainee.penalty is None else trainee.penalty.weights
        return [*noise, *of_penalty, *trainee.optimizer.variables]


def can_shrink(model: Any, steps_left: int) -> bool:
    """Whether training goes on through a compact copy.

    That is not so before gates have settled, nor where it would not pay (few steps left, or most
    of the network kept), unless the run was on a copy before it was resumed; with several replicas;
    with a callback that may read or change weights between batches, because they are put into the
    network when an epoch ends; or with an optimizer whose hyper-parameters follow its count of
    steps, that averages weights, accumulates gradients or excludes variables from weight decay,
    because the copy has an optimizer of its own.

    Args:
        model: A compiled `PrunableModel`.
        steps_left: Steps that are left of the run.
    """
    controller = model.controller
    if controller is None or model.gated is None or not model.shrink:
        return False
    if model.budget.is_open or not controller.has_settled or model.callbacks_act_on_batches:
        return False
    pays = steps_left >= _LEAST_STEPS and float(controller.fraction("macs")) <= _LARGEST_FRACTION
    optimizer = inner_optimizer(model.optimizer)
    remembers = optimizer.use_ema or optimizer.gradient_accumulation_steps
    starts_anew = model.constant_learning_rate is not None and not remembers
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
