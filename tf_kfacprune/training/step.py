"""One training step, from top to bottom."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import Batch, ForwardState
from tf_kfacprune.distribution import cond, num_replicas, sum_over_replicas, weighted_mean
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.pruning import PruningController
from tf_kfacprune.training.distributed import agreed, all_finite
from tf_kfacprune.training.running_statistics import forgetting_momentum
from tf_kfacprune.training.trainee import Trainee, call_network

__all__ = ["TrainingStep"]

_ALL = 0.999  # a mean over replicas of what is 1 on all of them, up to rounding


class TrainingStep:
    """The step of a model, once compiled; what it needs of the model comes in by argument.

    Args:
        trainee: The network that is trained, its optimizer and what looks at its curvature.
        controller: What closes gates and lets the learning rate of a settled network fall, or None.
        guard: Counts steps that are not finite.
        loss_of: `(batch, outputs) -> scalar`, the mean loss over the examples of this replica,
            with everything that layers add to it.
        prunes: Whether it is a step of the prune phase, where that is known before the step is
            traced: what it does not need is left out then. None if it may be any.
    """

    def __init__(
        self,
        trainee: Trainee,
        guard: Any,
        loss_of: Callable[[Batch, Any], Any],
        *,
        controller: PruningController | None = None,
        prunes: bool | None = None,
    ) -> None:
        self.trainee = trainee
        self.guard = guard
        self.loss_of = loss_of
        self.controller = controller
        self.prunes = prunes

    def __call__(self, batch: Batch, update_metrics: Callable[[Any, Any], None]) -> None:
        """Takes the step, or leaves it out if something is not finite.

        Args:
            batch: The batch.
            update_metrics: `(outputs, loss)`, called if the step is taken.
        """
        trainee, controller = self.trainee, self.controller
        if controller is not None and trainee.is_gated and self.prunes is None:
            controller.enter_due_phase()
        before = trainee.forward_state()
        outputs, loss, gradients, of_gates = self._loss_and_gradients(batch)
        finite = self._is_finite(loss, [*gradients, *of_gates])
        if num_replicas() > 1:
            together, finite = agreed([*gradients, *of_gates], finite, batch.size, before)
            gradients, of_gates = together[: len(gradients)], together[len(gradients) :]
        of_loss, gradients = gradients, self._penalized(gradients, batch)
        rejected = self._is_last_step_rejected(before, loss, finite, batch)

        def take() -> None:
            self._update_factors(batch)
            self._decay_learning_rate()
            scale = trainee.optimizer.scale_loss(tf.constant(1.0))  # the update may change it
            self._update_weights(gradients, of_loss, scale, batch)
            self._move_gates([g / scale for g in of_gates], batch)
            update_metrics(outputs, loss)

        def leave_out() -> None:
            before.restore()
            self._take_back_if(rejected)

        cond(tf.logical_and(finite, tf.logical_not(rejected)), take, leave_out)
        self.guard.count(finite)
        if controller is not None:
            controller.count_step()

    # ---- forward and backward

    def _loss_and_gradients(self, batch: Batch) -> tuple[Any, Any, list[Any], list[Any]]:
        """Outputs, loss, gradients of the trained variables, gradients of the gates' parameters.

        Gradients are those of the scaled loss.
        """
        trainee = self.trainee
        controller = self.controller if trainee.is_gated else None
        gates = [] if controller is None else controller.gate_parameters
        variables = [*trainee.variables, *gates]
        with tf.GradientTape() as tape, self._momentum_of_statistics():
            outputs = call_network(trainee.net, batch.x, training=True)
            loss = self.loss_of(batch, outputs)
            scaled = trainee.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [v.value for v in variables])
        count = len(trainee.variables)
        return outputs, loss, gradients[:count], gradients[count:]

    def _momentum_of_statistics(self) -> AbstractContextManager[None]:
        """Lets normalization forget the network from before pruning."""
        controller = self.controller
        if controller is None or self.prunes:
            return nullcontext()
        return forgetting_momentum(self.trainee.net, controller.steps_since_landing())

    def _penalized(self, gradients: list[Any], batch: Batch) -> list[Any]:
        """Gradients with those of the penalty on the curvature added."""
        trainee = self.trainee
        if trainee.penalty is None:
            return gradients
        scale = trainee.optimizer.scale_loss(tf.constant(1.0))
        return trainee.penalty.added(
            gradients, self.guard.step, batch, trainee.estimator, trainee.variables, scale
        )

    def _is_finite(self, loss: Any, gradients: Sequence[Any]) -> Any:
        finite = tf.math.is_finite(tf.cast(loss, "float32"))
        if isinstance(self.trainee.optimizer, keras.optimizers.LossScaleOptimizer):
            return finite  # overflowing gradients are its signal to lower the scale
        return tf.logical_and(finite, all_finite(gradients))

    # ---- the step before this one

    def _is_last_step_rejected(
        self, before: ForwardState, loss: Any, finite: Any, batch: Batch
    ) -> Any:
        """Adapts the damping by what the last step did to the loss on this batch, new to it.

        Args:
            before: State in which the pass on this batch began that gave `loss`.
            loss: Loss of the present weights on this batch.
            finite: Whether loss and gradients are finite, boolean scalar tensor.
            batch: The batch.

        Returns:
            Whether the step is to be taken back, boolean scalar tensor.
        """
        trainee, kfac = self.trainee, self.trainee.kfac
        if kfac is None or kfac.adaptive_damping is None:
            return tf.constant(False)
        damping, step = kfac.adaptive_damping, tf.convert_to_tensor(kfac.iterations)

        def judge() -> None:
            after = trainee.forward_state()
            before.restore()  # the same noise as in the pass that gave `loss`
            with kfac.last_step_undone():
                old_loss = self.loss_of(batch, call_network(trainee.net, batch.x, training=True))
            after.restore()
            # On a batch that was no good before the step either, the step is not to blame: it is
            # judged on the next one.
            is_good = tf.math.is_finite(old_loss)
            change = tf.where(is_good, loss - old_loss, 0.0)
            of_replica = [tf.cast(value, "float32") for value in (change, is_good)]
            change, share_good = weighted_mean(of_replica, batch.size)
            tf.cond(share_good > _ALL, lambda: damping.judge(change, step), damping.keep)

        (mean_loss,) = weighted_mean([tf.cast(loss, "float32")], batch.size)
        at_once = tf.logical_or(tf.logical_not(finite), damping.has_jumped(mean_loss))
        cond(damping.is_due(step, at_once), judge, damping.keep)
        damping.note(mean_loss, tf.logical_and(finite, tf.logical_not(damping.is_rejected)))
        return damping.is_rejected

    def _take_back_if(self, rejected: Any) -> None:
        kfac = self.trainee.kfac
        if kfac is not None and kfac.adaptive_damping is not None:
            cond(rejected, kfac.take_back_last_step, lambda: None)

    # ---- the update

    def _update_factors(self, batch: Batch) -> None:
        """Kronecker factors, every so many steps, from a pass of its own on a part of the batch."""
        trainee, kfac = self.trainee, self.trainee.kfac
        if kfac is None or not kfac.blocks:
            return

        def update() -> None:
            part = trainee.estimator.part_of(batch, kfac.batch_fraction)
            look = trainee.estimator.look(part, kfac.blocks, kfac.labels, training=True)
            kfac.update_factors(kfac.statistics(look), look.examples)

        cond(kfac.factors_due(), update, lambda: None)

    def _decay_learning_rate(self) -> None:
        controller, trainee = self.controller, self.trainee
        compiled = trainee.follows or trainee.optimizer
        if controller is None or self.prunes or not trainee.has_constant_rate:
            return

        def decay() -> None:
            compiled.learning_rate = controller.learning_rate()

        cond(controller.decays_now(), decay, lambda: None)
        if trainee.follows is not None:  # callbacks set and read what was compiled
            trainee.optimizer.learning_rate = tf.convert_to_tensor(compiled.learning_rate)
            compiled.iterations.assign_add(1)

    def _update_weights(
        self, gradients: Sequence[Any], of_loss: Sequence[Any], scale: Any, batch: Batch
    ) -> None:
        """The optimizer's step.

        Args:
            gradients: Of everything.
            of_loss: Of the loss alone.
            scale: What both are multiplied by.
            batch: The batch.
        """
        trainee, kfac = self.trainee, self.trainee.kfac
        pairs = list(zip(gradients, trainee.variables, strict=True))
        if kfac is None or not kfac.needs_quadratic_form:
            trainee.optimizer.apply_gradients(pairs)
            return
        in_model = None
        if trainee.penalty is not None:
            known = {id(v): g for v, g in zip(trainee.variables, of_loss, strict=True)}
            in_model = [_divided(known[id(v)], scale, v) for v in kfac.block_variables]
        form = functools.partial(self._quadratic_form, kfac, batch)
        with kfac.measured_by(form, in_model):
            trainee.optimizer.apply_gradients(pairs)

    def _quadratic_form(
        self, kfac: KFAC, batch: Batch, directions: Sequence[Sequence[Any]]
    ) -> tuple[Any, Any]:
        part = self.trainee.estimator.part_of(batch, kfac.batch_fraction)
        form = self.trainee.estimator.quadratic_form(
            part, kfac.block_variables, directions, is_whole=kfac.batch_fraction == 1.0
        )
        (mean,) = weighted_mean([form], part.size)
        (examples,) = sum_over_replicas([tf.cast(batch.size, "float32")])
        return mean, examples

    def _move_gates(self, gradients: Sequence[Any], batch: Batch) -> None:
        """One step of the policy on the gates, in the prune phase."""
        controller = self.controller
        if controller is None or not self.trainee.is_gated or self.prunes is False:
            return

        def move() -> None:
            controller.policy.observe(self.trainee.estimator, batch)
            controller.move_gates(gradients)

        # Gradients overflow now and then while a loss scale is being found.
        due = tf.logical_and(controller.is_pruning(), all_finite(gradients))
        cond(due, move, lambda: None)


def _divided(gradient: Any, scale: Any, variable: keras.Variable) -> Any:
    """A gradient without the scale of the loss; zeros if there is none."""
    if gradient is None:
        return tf.zeros(variable.shape, variable.dtype)
    return gradient / tf.cast(scale, gradient.dtype)
