"""Policies that switch gates on and off at set times, by a saliency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import tensorflow as tf

from tf_kfacprune.curvature import Batch, CurvatureEstimator
from tf_kfacprune.distribution import sum_over_replicas
from tf_kfacprune.pruning.phases import target_fraction
from tf_kfacprune.pruning.policies.base import Policy, PolicyState
from tf_kfacprune.pruning.task import PruningTask
from tf_kfacprune.validation import require_count

__all__ = ["Saliency", "ScheduledGates", "ScheduledPolicy"]

_LEAST_SAVING = 1e-9


@dataclass(frozen=True)
class ScheduledPolicy(Policy):
    """Opens and closes gates at set times; subclasses say by which saliency.

    At every `every`-th step of the prune phase the network is given the neurons with the highest
    scores, as many as fit into the budget of the moment, which falls along a ramp to the budget
    asked for. Gates are on or off; what is off is scored as well and comes back when its score
    says so. A layer keeps at least one neuron.

    Args:
        every: Steps from one selection to the next.
    """

    every: int = 20
    gate_kind: ClassVar[str] = "deterministic"

    def __post_init__(self) -> None:
        require_count(type(self).__name__, "every", self.every)

    def saliency(self, task: PruningTask, seed: int | None) -> Saliency:
        """The state of the saliency; arguments as of `build`."""
        raise NotImplementedError

    def build(self, task: PruningTask, seed: int | None) -> ScheduledGates:
        return ScheduledGates(task, self.every, self.saliency(task, seed), name="policy")


class Saliency(keras.layers.Layer):
    """What closing each neuron costs; the layer keeps what is remembered from step to step.

    Attributes:
        per_cost: Whether saliencies are compared per cost saved: what a neuron is worth against
            what its place would buy elsewhere.

    Args:
        task: What is to be pruned and how far.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    per_cost = True

    def __init__(self, task: PruningTask, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._task = task
        self.built = True

    def observe_batch(self, estimator: CurvatureEstimator, batch: Batch) -> None:
        """Called at every step of the prune phase, before `observe_gradient`.

        Args:
            estimator: What looks at the gated network.
            batch: The batch.
        """

    def observe_gradient(self, gradient: Any) -> None:
        """Called at every step of the prune phase with g, shape `(num_gates,)`."""

    def saliency(self) -> Any:
        """What closing each neuron costs, shape `(num_gates,)`."""
        raise NotImplementedError


class ScheduledGates(PolicyState):
    """State of a `ScheduledPolicy`.

    Args:
        task: What is to be pruned and how far.
        every: Steps from one selection to the next.
        criterion: The saliency.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    is_switching = True

    def __init__(self, task: PruningTask, every: int, criterion: Saliency, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        self._every = every
        self.criterion = criterion

    def observe(self, estimator: CurvatureEstimator, batch: Batch) -> None:
        self.criterion.observe_batch(estimator, batch)

    def move(self, loss_gradients: Sequence[Any], passed: Any, prune_steps: Any) -> None:
        """Scores all gates and, when it is time, switches them."""
        self.criterion.observe_gradient(tf.concat(sum_over_replicas(loss_gradients), axis=0))
        due = tf.equal(tf.cast(passed + 1, "int64") % self._every, 0)
        tf.cond(due, lambda: self._switch(passed / prune_steps), lambda: None)

    def _switch(self, progress: Any) -> None:
        task = self._task
        wanted = {m: target_fraction(t, progress) for m, t in task.budget.targets.items()}
        keep = task.keep_within(wanted, self.scores(), fill=False)
        for parameters, part in zip(task.gate_parameters, task.split(keep), strict=True):
            parameters.assign(part)

    def scores(self) -> Any:
        """How much each gate deserves to stay open, given which others are open now.

        A saliency above zero counts per cost c that closing the neuron saves: the knapsack keeps
        what has `b > lambda c`. One below zero is kept for no lambda; there the order is that of
        `b c`, so that of two neurons equally harmful the dearer one goes first.
        """
        saliency = self.criterion.saliency()
        if not self.criterion.per_cost:
            return saliency
        saved = tf.maximum(self._savings(), _LEAST_SAVING)
        return tf.where(saliency > 0.0, saliency / saved, saliency * saved)

    def _savings(self) -> Any:
        """What closing each gate saves of the costs in the budget, relative to the budget."""
        task = self._task
        openness = task.actual_openness()
        with tf.GradientTape() as tape:
            tape.watch(openness)
            cost = tf.add_n(
                [task.gated.cost.fraction(m, openness) / t for m, t in task.budget.targets.items()]
            )
        return task.to_gates(tape.gradient(cost, openness))
