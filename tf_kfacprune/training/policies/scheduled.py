"""Gates that are switched on and off at set times, by a criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_kfacprune.distribution import sum_over_replicas
from tf_kfacprune.pruning import ScheduledClosing, target_fraction
from tf_kfacprune.training.policies.base import PolicyState
from tf_kfacprune.training.policies.criteria import CRITERION_STATES
from tf_kfacprune.training.pruning_plan import PruningPlan

__all__ = ["ScheduledGates"]

_LEAST_SAVING = 1e-9


class ScheduledGates(PolicyState):
    """State of `ScheduledClosing`.

    Args:
        plan: What is to be pruned and how far.
        settings: The policy.
        seed: Seed of a random order of neurons, or None.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        plan: PruningPlan,
        settings: ScheduledClosing,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(plan, **kwargs)
        self.settings = settings
        self.criterion = CRITERION_STATES[settings.criterion](plan, seed, name="criterion")

    def observe(self, x: Any, mean_losses: Callable[[Any], Sequence[Any]]) -> None:
        self.criterion.observe_batch(x, mean_losses)

    def move(self, loss_gradients: Sequence[Any], passed: Any, prune_steps: Any) -> None:
        """Scores all gates and, when it is time, switches them."""
        self.criterion.observe_gradient(tf.concat(sum_over_replicas(loss_gradients), axis=0))
        due = tf.equal(tf.cast(passed + 1, "int64") % self.settings.every, 0)
        tf.cond(due, lambda: self._switch(passed / prune_steps), lambda: None)

    def _switch(self, progress: Any) -> None:
        plan = self._plan
        wanted = {m: target_fraction(t, progress) for m, t in plan.budget.targets.items()}
        keep = plan.keep_within(wanted, self.scores(), fill=False)
        for logits, part in zip(plan.logits, plan.split(keep), strict=True):
            logits.assign(part)

    def scores(self) -> Any:
        """Saliency per cost that closing the neuron saves, given which others are open now."""
        saliency = self.criterion.saliency()
        if not self.criterion.per_cost:
            return saliency
        return saliency / tf.maximum(self._savings(), _LEAST_SAVING)

    def _savings(self) -> Any:
        """What closing each gate saves of the costs in the budget, relative to the budget."""
        plan = self._plan
        openness = plan.actual_openness()
        with tf.GradientTape() as tape:
            tape.watch(openness)
            cost = tf.add_n(
                [plan.gated.cost.fraction(m, openness) / t for m, t in plan.budget.targets.items()]
            )
        return plan.to_gates(tape.gradient(cost, openness))
