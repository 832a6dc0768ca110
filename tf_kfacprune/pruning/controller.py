"""Leads a network through the phases of a `fit` and onto its budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.gates import GatePhase
from tf_kfacprune.pruning.policies import PolicyState
from tf_kfacprune.pruning.task import PruningTask

__all__ = ["PruningController"]


class PruningController(keras.layers.Layer):
    """State and rules of the three phases; a layer so that it is saved with the model.

    Args:
        task: What is to be pruned and how far.
        policy: How gates are moved while pruning.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, task: PruningTask, policy: PolicyState, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._task = task
        self.policy = policy

        def state(name: str, dtype: str) -> keras.Variable:
            return self.add_weight((), "zeros", dtype=dtype, trainable=False, name=name)

        self.step = state("step", "int64")
        self.prune_start = state("prune_start", "int64")
        self.prune_end = state("prune_end", "int64")
        self.total_steps = state("total_steps", "int64")
        self.is_whole = state("is_whole", "bool")
        self.base_learning_rate = state("base_learning_rate", "float32")
        self.built = True

    @property
    def gate_parameters(self) -> list[keras.Variable]:
        """The trainable parameters of all gates."""
        return self._task.gate_parameters

    def phase(self) -> Any:
        """The current `GatePhase`, a scalar tensor."""
        return tf.convert_to_tensor(self._task.gated.sources[0].phase)

    def phase_now(self) -> GatePhase:
        """The current phase, read from the device."""
        return GatePhase(int(ops.convert_to_numpy(self.phase())))

    @property
    def has_settled(self) -> bool:
        """Whether the network is on its budget for good."""
        return self._task.budget.is_open or self.phase_now() == GatePhase.SETTLED

    @property
    def is_scheduled(self) -> bool:
        """Whether the length of the run is known, so that its phases are."""
        return int(ops.convert_to_numpy(self.total_steps)) > 0

    @property
    def is_within_plan(self) -> bool:
        """Whether the whole run was laid out beforehand and is not over yet."""
        step, planned = (int(ops.convert_to_numpy(v)) for v in (self.step, self.total_steps))
        return bool(ops.convert_to_numpy(self.is_whole)) and step < planned

    def schedule(
        self, total_steps: int, learning_rate: float | None, *, is_whole: bool = False
    ) -> float | None:
        """Lays out the phases over a run; a network that has settled before stays settled.

        A longer run (`fit(epochs=60, initial_epoch=30)`) decays the learning rate to its new end.
        A further one, after the end of the last, leaves the learning rate alone.

        Args:
            total_steps: Steps of the run, those done before a resume included.
            learning_rate: The constant learning rate to decay, or None to leave it alone.
            is_whole: Whether that is the whole run, of which each `fit` to come is a part.

        Returns:
            The learning rate that an earlier run began its decay with if that run is over and its
            decay is what the optimizer would go on with; otherwise None.
        """
        if not is_whole and self.is_within_plan:
            return None
        step = int(ops.convert_to_numpy(self.step))
        self.is_whole.assign(is_whole)
        if self.has_settled:
            return self._schedule_further(total_steps, learning_rate)
        start, end = self._task.phases.boundaries(total_steps)
        self.prune_start.assign(start)
        self.prune_end.assign(end)
        self.total_steps.assign(total_steps)
        if step == 0:
            decays = self._task.phases.decay and learning_rate is not None
            self.base_learning_rate.assign(learning_rate if decays else 0.0)
            self.policy.prepare(end - start)
        return None

    def _schedule_further(self, total_steps: int, learning_rate: float | None) -> float | None:
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
            learning_rate: As for `schedule`.
        """
        if int(ops.convert_to_numpy(self.step)) > 0:
            decays = self._task.phases.decay and learning_rate is not None
            self.base_learning_rate.assign(learning_rate if decays else 0.0)

    def leave_learning_rate(self) -> None:
        """Leaves the learning rate to others, such as callbacks, from now on."""
        self.base_learning_rate.assign(0.0)

    @property
    def decays_sooner_or_later(self) -> bool:
        """Whether the learning rate is decayed, now or once the gates have settled."""
        return float(ops.convert_to_numpy(self.base_learning_rate)) > 0.0

    def has_pruned_within(self, steps: int | None) -> bool:
        """Whether a whole run was so short, and nobody had said that it would be.

        Args:
            steps: Steps of an epoch, or None if unknown.
        """
        if steps is None or self._task.budget.is_open or not self.has_settled:
            return False
        planned, is_whole = (ops.convert_to_numpy(v) for v in (self.total_steps, self.is_whole))
        return not is_whole and 0 < planned <= steps

    # ---- between steps, or inside of one

    def due_phase(self, step: int) -> GatePhase:
        """The phase that a step belongs to, from numbers alone; the step before is in its own.

        Args:
            step: Number of the step.
        """
        phase = self.phase_now()
        if self._task.budget.is_open or not self.is_scheduled:
            return phase
        if phase == GatePhase.HELD_OPEN and step >= int(ops.convert_to_numpy(self.prune_start)):
            phase = GatePhase.PRUNING
        if phase == GatePhase.PRUNING and step >= int(ops.convert_to_numpy(self.prune_end)):
            phase = GatePhase.SETTLED
        return phase

    def steps_left_in_phase(self) -> float:
        """How many steps from now on belong to the current phase, perhaps infinitely many."""
        phase = self.phase_now()
        if self.has_settled or not self.is_scheduled:
            return math.inf
        end = self.prune_start if phase == GatePhase.HELD_OPEN else self.prune_end
        end, step = (int(ops.convert_to_numpy(value)) for value in (end, self.step))
        return end - step

    def enter_due_phase(self) -> None:
        """Starts pruning or settles when the step for it has come; before the forward pass."""
        if self._task.budget.is_open:
            return
        step = tf.convert_to_tensor(self.step)
        is_scheduled = tf.convert_to_tensor(self.total_steps) > 0
        starts = tf.logical_and(is_scheduled, step >= tf.convert_to_tensor(self.prune_start))
        starts = tf.logical_and(starts, tf.equal(self.phase(), int(GatePhase.HELD_OPEN)))
        tf.cond(starts, self._start_pruning, lambda: None)
        ends = step >= tf.convert_to_tensor(self.prune_end)
        ends = tf.logical_and(ends, tf.equal(self.phase(), int(GatePhase.PRUNING)))
        tf.cond(ends, self.land, lambda: None)

    def count_step(self) -> None:
        """Counts a step of the run, if there is a run; called at the end of every step."""
        is_scheduled = tf.convert_to_tensor(self.total_steps) > 0
        self.step.assign_add(tf.cast(is_scheduled, "int64"))

    def _start_pruning(self) -> None:
        for source in self._task.gated.sources:
            source.phase.assign(int(GatePhase.PRUNING))

    def land(self) -> None:
        """Ends the pruning phase: closes what does not fit and settles every gate."""
        task = self._task
        keep = task.keep_within(task.budget.targets, self.policy.scores())
        for source, part in zip(task.gated.sources, task.split(keep), strict=True):
            source.settle(part)

    def is_pruning(self) -> Any:
        """Boolean scalar tensor: whether gates are being moved."""
        return tf.equal(self.phase(), int(GatePhase.PRUNING))

    def move_gates(self, loss_gradients: Sequence[Any]) -> None:
        """One step of the gates, as the policy has it.

        Args:
            loss_gradients: Gradients of the loss with respect to each of `gate_parameters`; under
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
        if self._task.budget.is_open:  # on an open budget nothing ever lands
            landed = tf.constant(False)
        return tf.where(landed, since, since.dtype.max)

    def decays_now(self) -> Any:
        """Boolean scalar tensor: whether `learning_rate` applies at this step."""
        settled = tf.equal(self.phase(), int(GatePhase.SETTLED))
        return tf.logical_and(settled, tf.convert_to_tensor(self.base_learning_rate) > 0)

    # ---- figures

    def fraction(self, measure: str) -> Any:
        """Cost of the deterministic network relative to the dense one, a scalar tensor."""
        return self._task.fraction(measure)

    def figures(self) -> dict[str, Any]:
        """What the progress bar shows: expected and actual cost, neurons left, prices."""
        task, cost = self._task, self._task.gated.cost
        actual, expected = task.actual_openness(), task.expected_openness()
        result = {"neurons": ops.sum(actual)}
        # Counts always, estimates where the budget bounds them.
        for measure in dict.fromkeys([*cost.measures, *self._task.budget.targets]):
            result[measure] = cost.fraction(measure, actual)
            if not self.policy.is_switching:  # else the two are the same
                result[f"expected_{measure}"] = cost.fraction(measure, expected)
        return {**result, **self.policy.figures()}
