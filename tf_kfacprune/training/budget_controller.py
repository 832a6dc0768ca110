"""Leads a network through the phases of a `fit` and onto its budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.gates import GatePhase
from tf_kfacprune.training.policies import PolicyState
from tf_kfacprune.training.pruning_plan import PruningPlan

__all__ = ["BudgetController"]


class BudgetController(keras.layers.Layer):
    """State and rules of the three phases; a layer so that it is saved with the model.

    Args:
        plan: What is to be pruned and how far.
        policy: How gates are moved while pruning.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, plan: PruningPlan, policy: PolicyState, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._plan = plan
        self.policy = policy

        def state(name: str, dtype: str) -> keras.Variable:
            return self.add_weight((), "zeros", dtype=dtype, trainable=False, name=name)

        self.step = state("step", "int64")
        self.prune_start = state("prune_start", "int64")
        self.prune_end = state("prune_end", "int64")
        self.total_steps = state("total_steps", "int64")
        self.base_learning_rate = state("base_learning_rate", "float32")
        self.built = True

    @property
    def logits(self) -> list[keras.Variable]:
        """The trainable parameters of all gates."""
        return self._plan.logits

    def phase(self) -> Any:
        """The current `GatePhase`, a scalar tensor."""
        return tf.convert_to_tensor(self._plan.gated.sources[0].phase)

    @property
    def has_settled(self) -> bool:
        """Whether the network is on its budget for good."""
        return self._plan.budget.is_open or int(self.phase()) == GatePhase.SETTLED

    def plan(self, total_steps: int, learning_rate: float | None) -> float | None:
        """Lays out the phases over a run; a network that has settled before stays settled.

        A longer run (`fit(epochs=60, initial_epoch=30)`) decays the learning rate to its new end.
        A further one, after the end of the last, leaves the learning rate alone.

        Args:
            total_steps: Steps of the run, those done before a resume included.
            learning_rate: The constant learning rate to decay, or None to leave it alone.

        Returns:
            The learning rate that an earlier run began its decay with if that run is over and its
            decay is what the optimizer would go on with; otherwise None.
        """
        if self.has_settled:
            return self._plan_further(total_steps, learning_rate)
        start, end = self._plan.phases.boundaries(total_steps)
        self.prune_start.assign(start)
        self.prune_end.assign(end)
        self.total_steps.assign(total_steps)
        if int(tf.convert_to_tensor(self.step)) == 0:
            decays = self._plan.phases.decay and learning_rate is not None
            self.base_learning_rate.assign(learning_rate if decays else 0.0)
            self.policy.prepare(end - start)
        return None

    def _plan_further(self, total_steps: int, learning_rate: float | None) -> float | None:
        step, planned, landed, base = (
            float(ops.convert_to_numpy(v))
            for v in (self.step, self.total_steps, self.prune_end, self.base_learning_rate)
        )
        if total_steps > planned:
            self.total_steps.assign(total_steps)
        elif step >= planned and base > 0:
            self.base_learning_rate.assign(0.0)
            last = 0.5 * base * (1.0 + math.cos(math.pi * (1.0 - 1.0 / (planned - landed))))
            if learning_rate is not None and learning_rate <= 1.001 * last:
                return base
        return None

    def change_learning_rate(self, learning_rate: float | None) -> None:
        """Another learning rate to decay, of an optimizer that is compiled in the middle of a run.

        Args:
            learning_rate: As for `plan`.
        """
        if int(ops.convert_to_numpy(self.step)) > 0:
            decays = self._plan.phases.decay and learning_rate is not None
            self.base_learning_rate.assign(learning_rate if decays else 0.0)

    # ------------------------------------------------------------------ inside the training step

    def enter_phase(self) -> None:
        """Starts pruning or settling when its step has come; called before the forward pass."""
        if self._plan.budget.is_open:
            return
        step, phase = tf.convert_to_tensor(self.step), self.phase()
        starts = tf.logical_and(
            phase == int(GatePhase.HELD_OPEN), step >= tf.convert_to_tensor(self.prune_start)
        )
        ends = tf.logical_and(
            phase == int(GatePhase.PRUNING), step >= tf.convert_to_tensor(self.prune_end)
        )
        tf.cond(starts, self._start_pruning, lambda: None)
        tf.cond(ends, self.land, lambda: None)

    def _start_pruning(self) -> None:
        for source in self._plan.gated.sources:
            source.phase.assign(int(GatePhase.PRUNING))

    def land(self) -> None:
        """Ends the pruning phase: closes what does not fit and settles every gate."""
        plan = self._plan
        keep = plan.keep_within(plan.budget.targets, self.policy.scores())
        for source, part in zip(plan.gated.sources, plan.split(keep), strict=True):
            source.settle(part)

    def is_pruning(self) -> Any:
        """Boolean scalar tensor: whether gates are being moved."""
        return tf.equal(self.phase(), int(GatePhase.PRUNING))

    def move_gates(self, loss_gradients: Sequence[Any]) -> None:
        """One step of the gates, as the policy has it.

        Args:
            loss_gradients: Gradients of the loss with respect to each of `logits`; under
                `tf.distribute`, this replica's part of them.
        """
        passed = tf.cast(tf.convert_to_tensor(self.step - self.prune_start), "float32")
        steps = tf.cast(tf.convert_to_tensor(self.prune_end - self.prune_start), "float32")
        self.policy.move(loss_gradients, passed, steps)

    def learning_rate(self) -> Any:
        """The decayed learning rate while settling, a scalar tensor."""
        step = tf.convert_to_tensor(self.step)
        left = tf.cast(self.total_steps - self.prune_end, "float32")
        progress = tf.cast(step - tf.convert_to_tensor(self.prune_end), "float32") / left
        cosine = 0.5 * (1.0 + tf.cos(math.pi * tf.clip_by_value(progress, 0.0, 1.0)))
        return tf.convert_to_tensor(self.base_learning_rate) * cosine

    def steps_since_landing(self) -> Any:
        """Steps since the network landed, a scalar tensor; very many if it has not."""
        since = tf.convert_to_tensor(self.step) - tf.convert_to_tensor(self.prune_end)
        landed = tf.equal(self.phase(), int(GatePhase.SETTLED))
        if self._plan.budget.is_open:  # on an open budget nothing ever lands
            landed = tf.constant(False)
        return tf.where(landed, since, since.dtype.max)

    def decays_now(self) -> Any:
        """Boolean scalar tensor: whether `learning_rate` applies at this step."""
        settled = tf.equal(self.phase(), int(GatePhase.SETTLED))
        return tf.logical_and(settled, tf.convert_to_tensor(self.base_learning_rate) > 0)

    # ------------------------------------------------------------------ figures

    def fraction(self, measure: str) -> Any:
        """Cost of the deterministic network relative to the dense one, a scalar tensor."""
        return self._plan.fraction(measure)

    def figures(self) -> dict[str, Any]:
        """What the progress bar shows: expected and actual cost, neurons left, prices."""
        cost = self._plan.gated.cost
        actual, expected = self._plan.actual_openness(), self._plan.expected_openness()
        result = {"neurons": ops.sum(actual)}
        # Counts always, estimates where the budget bounds them.
        for measure in dict.fromkeys([*cost.measures, *self._plan.budget.targets]):
            result[measure] = cost.fraction(measure, actual)
            result[f"expected_{measure}"] = cost.fraction(measure, expected)
        return {**result, **self.policy.figures()}
