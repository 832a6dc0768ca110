r"""Saliencies: what the loss would be worse by if a neuron were closed.

=======  ==============================================================  ======
symbol   meaning                                                         shape
=======  ==============================================================  ======
`z`      gates, 0 or 1                                                   (n,)
`g`      gradient of the loss of one batch with respect to z             (n,)
`F`      curvature of the loss along each gate (`gate_curvature`)        (n,)
`b`      loss with the neuron closed minus loss with it open             (n,)
=======  ==============================================================  ======

To second order `loss(1) - loss(0) = g + F/2` seen from z = 0, and `g - F/2` seen from z = 1, so

    b = -g + (z - 1/2) F.

For an open neuron in a trained network g is near 0 and b is half the curvature, as in optimal
brain damage; for a closed one b is what reopening it would gain. In the quadratic model b is the
same from both sides, so its running average stays right when a gate is switched.

References:
    LeCun, Denker, Solla 1989, "Optimal Brain Damage", equation 5. Molchanov et al. 2019,
    "Importance Estimation for Neural Network Pruning", equation 8 (`taylor`). Fang et al. 2023,
    "DepGraph: Towards Any Structural Pruning" (`magnitude` of coupled weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_kfacprune.curvature import (
    LABELS,
    Batch,
    CurvatureEstimator,
    find_gate_layers,
    gate_curvature,
)
from tf_kfacprune.distribution import cond, weighted_mean
from tf_kfacprune.graph import rule_for
from tf_kfacprune.graph.rules import weight_of
from tf_kfacprune.pruning.policies.scheduled import Saliency, ScheduledPolicy
from tf_kfacprune.pruning.task import PruningTask
from tf_kfacprune.validation import require, require_count, require_number

__all__ = [
    "KFACSaliency",
    "MagnitudeSaliency",
    "RandomSaliency",
    "TaylorSaliency",
]

_TINY = 1e-12


class RunningMean(keras.layers.Layer):
    """An exponential average of vectors, without bias toward its start.

    Args:
        size: Length of the vectors.
        decay: Weight of the past.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, size: int, decay: float, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._decay = decay
        self.total = self.add_weight((size,), "zeros", trainable=False, name="total")
        self.weight = self.add_weight((), "zeros", trainable=False, name="weight")
        self.built = True

    def update(self, value: Any) -> None:
        """Adds one vector, unless it is not finite."""
        is_finite = tf.reduce_all(tf.math.is_finite(value))
        keep = tf.where(is_finite, self._decay, 1.0)
        value = tf.where(is_finite, value, tf.zeros_like(value))
        self.total.assign(keep * tf.convert_to_tensor(self.total) + (1.0 - keep) * value)
        self.weight.assign(keep * tf.convert_to_tensor(self.weight) + (1.0 - keep))

    def value(self) -> Any:
        """The average, zeros before the first vector."""
        return tf.convert_to_tensor(self.total) / (tf.convert_to_tensor(self.weight) + _TINY)


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class KFACSaliency(ScheduledPolicy):
    """Closes the neurons that the loss would miss least by its Kronecker-factored curvature.

    A neuron's saliency is `b = -g + (z - 1/2) F`: the loss with it closed minus the loss with it
    open, to second order, whichever of the two it is now. It is compared per cost saved.

    Args:
        every: Steps from one selection to the next.
        batch_fraction: Share of the batch that F is computed on, in (0, 1]; with BatchNormalization
            at least 16 examples, as far as there are so many.
        curvature_every: Steps between computations of F, each a pass of its own.
        curvature_decay: Decay of the average of F per computation, in [0, 1).
        gradient_decay: Decay of the average of b per step, in [0, 1).
        labels: `"sampled"` from the model, `"data"` or `"exact"`: as of `KFAC`.

    Raises:
        InvalidArgumentError: If an argument has the wrong type or value.

    Examples:
        >>> policy = kp.KFACSaliency(every=20)
        >>> pm = kp.PrunableModel(network, kp.Budget(macs=0.1), policy=policy)

    References:
        LeCun, Denker, Solla 1989, "Optimal Brain Damage". Zhu & Gupta 2017 (ramp).
    """

    batch_fraction: float = 0.25
    curvature_every: int = 5
    curvature_decay: float = 0.9
    gradient_decay: float = 0.99
    labels: str = "sampled"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        require_count(owner, "curvature_every", self.curvature_every)
        require_number(owner, "batch_fraction", self.batch_fraction, "(0, 1]")
        for name in ("curvature_decay", "gradient_decay"):
            require_number(owner, name, getattr(self, name), "[0, 1)")
        require(owner, self.labels in LABELS, "labels", f"one of {LABELS}", self.labels)

    def saliency(self, task: PruningTask, seed: int | None) -> Saliency:
        return KFACState(task, self, name="criterion")


class KFACState(Saliency):
    """b, with the Kronecker-factored curvature of the gates."""

    def __init__(self, task: PruningTask, settings: KFACSaliency, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        self._settings = settings
        size = task.gated.num_gates
        self.curvature = RunningMean(size, settings.curvature_decay, name="curvature")
        self.worth = RunningMean(size, settings.gradient_decay, name="worth")
        self.step = self.add_weight((), "zeros", dtype="int64", trainable=False, name="step")

    def observe_batch(self, estimator: CurvatureEstimator, batch: Batch) -> None:
        settings, gated = self._settings, self._task.gated

        def measure() -> None:
            part = estimator.part_of(batch, settings.batch_fraction)
            # In training mode, as the gradient g beside it in b.
            found = gate_curvature(
                gated, find_gate_layers(gated), estimator, part, settings.labels, training=True
            )
            (mean,) = weighted_mean([found], part.size)
            self.curvature.update(mean)

        cond(tf.equal(self.step % settings.curvature_every, 0), measure, lambda: None)
        self.step.assign_add(1)

    def observe_gradient(self, gradient: Any) -> None:
        z = self._task.parameters()
        self.worth.update(-gradient + (z - 0.5) * self.curvature.value())

    def saliency(self) -> Any:
        return self.worth.value()


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class TaylorSaliency(ScheduledPolicy):
    """Closes the neurons that the loss would miss least by its gradient, per cost saved.

    Args:
        every: Steps from one selection to the next.
        gradient_decay: Decay of the average of squared gradients per step, in [0, 1).

    Raises:
        InvalidArgumentError: If an argument has the wrong type or value.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8.
    """

    gradient_decay: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("TaylorSaliency", "gradient_decay", self.gradient_decay, "[0, 1)")

    def saliency(self, task: PruningTask, seed: int | None) -> Saliency:
        return TaylorState(task, self.gradient_decay, name="criterion")


class TaylorState(Saliency):
    """`E g^2`: the square of the change to first order when the gate is switched."""

    def __init__(self, task: PruningTask, decay: float, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        self.squares = RunningMean(task.gated.num_gates, decay, name="squares")

    def observe_gradient(self, gradient: Any) -> None:
        self.squares.update(tf.square(gradient))

    def saliency(self) -> Any:
        return self.squares.value()


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class MagnitudeSaliency(ScheduledPolicy):
    """Closes the neurons with the smallest weights, relative to the mean of their group.

    Args:
        every: Steps from one selection to the next.

    Raises:
        InvalidArgumentError: If an argument has the wrong type or value.

    References:
        Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", section 3.3.
    """

    def saliency(self, task: PruningTask, seed: int | None) -> Saliency:
        return MagnitudeState(task, name="criterion")


class MagnitudeState(Saliency):
    """Norm of all kernel weights that would go with the neuron.

    Relative to the mean norm of the neuron's group: kernels of different layers differ in scale.
    """

    per_cost = False

    def saliency(self) -> Any:
        gated = self._task.gated
        count = gated.channels.num_neurons
        squares: Any = tf.zeros(count + 1)
        for layer in dict.fromkeys(call.operation for call in gated.graph.calls):
            rule, roles = rule_for(layer), gated.channels.roles(layer)
            for name, axes in rule.weight_roles(layer).items():
                weight = tf.cast(tf.convert_to_tensor(weight_of(layer, name)), "float32")
                for axis, role in enumerate(axes):
                    if len(axes) > 1 and role in roles:
                        rest = [k for k in range(len(axes)) if k != axis]
                        per_channel = tf.reduce_sum(tf.square(weight), axis=rest)
                        squares += tf.math.unsorted_segment_sum(per_channel, roles[role], count + 1)
        sizes = [group.size for group in gated.channels.groups]
        of_neuron = np.repeat(np.arange(len(sizes)), sizes)
        norms = tf.sqrt(squares[:-1])
        sums = tf.math.unsorted_segment_sum(norms, of_neuron, len(sizes))  # which XLA has
        means = sums / tf.constant(sizes, "float32")
        return self._task.to_gates(norms / (tf.gather(means, of_neuron) + _TINY))


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class RandomSaliency(ScheduledPolicy):
    """Closes neurons in a random order that never changes; for comparison.

    Args:
        every: Steps from one selection to the next.

    Raises:
        InvalidArgumentError: If an argument has the wrong type or value.
    """

    def saliency(self, task: PruningTask, seed: int | None) -> Saliency:
        return RandomState(task, seed, name="criterion")


class RandomState(Saliency):
    """A random order of the neurons."""

    per_cost = False

    def __init__(self, task: PruningTask, seed: int | None, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        order = np.random.default_rng(seed).permutation(task.gated.num_gates)
        initializer = keras.initializers.Constant(order.astype("float32"))
        self.order = self.add_weight(order.shape, initializer, trainable=False, name="order")

    def saliency(self) -> Any:
        return tf.convert_to_tensor(self.order)
