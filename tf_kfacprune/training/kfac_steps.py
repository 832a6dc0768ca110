"""The part of `KFACModel` that serves its optimizer: factors, quadratic model, judged steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import gauss_newton_form, of_examples, probe_gradients
from tf_kfacprune.distribution import ReplicaSeedGenerator, cond, num_replicas, weighted_mean
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.training.batches import head_of_batch, num_examples
from tf_kfacprune.training.compiled import Compiled, inner_optimizer
from tf_kfacprune.training.distributed import all_finite
from tf_kfacprune.training.forward_state import ForwardState

__all__ = ["KFACSteps"]


class KFACSteps(keras.Model):
    """Base of `KFACModel`, which sets the attributes below.

    Attributes:
        net: The network that is trained.
        seed_generator: Where sampled labels come from.
    """

    net: keras.Model
    seed_generator: ReplicaSeedGenerator
    _compiled: Compiled

    @property
    def network_variables(self) -> list[keras.Variable]:
        """What the compiled optimizer trains."""
        return self.net.trainable_variables

    @property
    def _kfac(self) -> KFAC | None:
        inner = inner_optimizer(self.optimizer)
        return inner if isinstance(inner, KFAC) else None

    def _loss_of_replica(self, **arguments: Any) -> Any:
        """Mean loss over this replica's examples; Keras' own is divided by the replicas."""
        loss = self.compute_loss(**arguments)
        return loss if num_replicas() == 1 else loss * tf.cast(num_replicas(), loss.dtype)

    def _forward_state(self) -> ForwardState:
        return ForwardState(self.net)

    def _is_finite(self, loss: Any, gradients: Sequence[Any]) -> Any:
        finite = tf.math.is_finite(tf.cast(loss, "float32"))
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return finite  # overflowing gradients are its signal to lower the scale
        return tf.logical_and(finite, all_finite(gradients))

    def _mean_loss(self, labels: str) -> Any:
        """`(outputs, y) -> scalars`: likelihoods of the model's own labels, or the compiled loss.

        Args:
            labels: `"sampled"`, `"exact"` or `"data"`.
        """
        compiled = self._compiled
        if labels == "sampled" and compiled.sampled is not None:
            sampled = compiled.sampled
            return lambda outputs, y: [sampled(outputs, self.seed_generator)]
        if labels == "exact" and compiled.exact is not None:
            exact = compiled.exact
            return lambda outputs, y: exact(outputs)
        return lambda outputs, y: [self._loss_of_replica(y=y, y_pred=outputs, training=False)]

    def _update_factors(self, x: Any, y: Any, weights: Any) -> None:
        kfac = self._kfac
        if kfac is None or not kfac.blocks:
            return
        mean_loss = self._mean_loss(kfac.labels)
        x, y, weights = (head_of_batch(part, kfac.batch_fraction) for part in (x, y, weights))

        def update() -> None:
            # This second forward pass must not move the normalization statistics again.
            state = self._forward_state()
            records, probes = probe_gradients(
                self.net, x, kfac.blocks, lambda outputs: mean_loss(outputs, y), training=True
            )
            state.restore()
            if weights is not None:  # gradients enter the Fisher squared
                root = tf.sqrt(tf.maximum(weights, 0.0))
                probes = [[g * of_examples(root, g) for g in probe] for probe in probes]
            kfac.update_factors(kfac.statistics(records, probes), num_examples(x))

        cond(kfac.factors_due(), update, lambda: None)

    def _apply(
        self,
        gradients: Sequence[Any],
        variables: Sequence[keras.Variable],
        x: Any,
        y: Any,
        weights: Any,
    ) -> None:
        kfac = self._kfac
        count = len(self.network_variables)
        pairs = list(zip(gradients[:count], variables[:count], strict=True))
        if kfac is None:
            self.optimizer.apply_gradients(pairs)
            return
        form = functools.partial(self._quadratic_form, kfac, x, y, weights)
        with kfac.measured_by(form):
            self.optimizer.apply_gradients(pairs)

    def _quadratic_form(self, kfac: KFAC, x: Any, y: Any, weights: Any, directions: Any) -> Any:
        state = self._forward_state()
        x = head_of_batch(x, kfac.batch_fraction)
        products = gauss_newton_form(
            self.net,
            x,
            head_of_batch(y, kfac.batch_fraction),
            self._compiled.objective(),
            kfac.block_variables,
            directions,
            training=True,
            weights=head_of_batch(weights, kfac.batch_fraction),
        )
        state.restore()
        return weighted_mean([products], num_examples(x))[0]

    def _is_last_step_rejected(
        self, before: ForwardState, loss: Any, finite: Any, x: Any, y: Any, sample_weight: Any
    ) -> Any:
        """Adapts the damping by what the last step did to the loss on this batch, new to it.

        Args:
            before: State in which the pass on this batch began that gave `loss`.
            loss: Loss of the present weights on this batch.
            finite: Whether loss and gradients are finite, boolean scalar tensor.
            x: Inputs.
            y: Labels.
            sample_weight: Weights of the examples, or None.

        Returns:
            Whether the step is to be taken back, boolean scalar tensor.
        """
        kfac = self._kfac
        if kfac is None or kfac.adaptive_damping is None:
            return tf.constant(False)
        damping, step = kfac.adaptive_damping, tf.convert_to_tensor(kfac.iterations)

        def judge() -> None:
            after = self._forward_state()
            before.restore()  # the same noise as in the pass that gave `loss`
            with kfac.last_step_undone():
                y_pred = self(x, training=True)
                old_loss = self._loss_of_replica(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
            after.restore()
            # On a batch that was no good before the step either, the step is not to blame.
            change = tf.where(tf.math.is_finite(old_loss), loss - old_loss, 0.0)
            (change,) = weighted_mean([tf.cast(change, "float32")], num_examples(x))
            damping.judge(change, step)

        cond(tf.logical_or(damping.is_due(step), tf.logical_not(finite)), judge, damping.keep)
        return damping.is_rejected

    def _take_back_if(self, rejected: Any) -> None:
        """Takes the last step back if it was rejected."""
        kfac = self._kfac
        if kfac is not None and kfac.adaptive_damping is not None:
            cond(rejected, kfac.take_back_last_step, lambda: None)
