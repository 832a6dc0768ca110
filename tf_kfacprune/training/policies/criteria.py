r"""Criteria of scheduled closing: what the loss would be worse by if a neuron were closed.

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

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_kfacprune.curvature import find_gate_layers, gate_curvature
from tf_kfacprune.distribution import cond, weighted_mean
from tf_kfacprune.graph import rule_for
from tf_kfacprune.graph.rules import weight_of
from tf_kfacprune.training.batches import head_of_batch, num_examples
from tf_kfacprune.training.pruning_plan import PruningPlan

__all__ = ["CRITERION_STATES", "Criterion", "KFACCriterion"]

_GRADIENT_DECAY = 0.99
# A pass for the curvature looks at every example of a part of the batch, a gradient at their sum.
_CURVATURE_EVERY = 5
_CURVATURE_DECAY = 0.9
_BATCH_FRACTION = 0.25
_TINY = 1e-12

MeanLosses = Callable[[Any], Sequence[Any]]


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


class Criterion(keras.layers.Layer):
    """Base of the criteria; the layer keeps what has to be remembered from step to step.

    Attributes:
        per_cost: Whether saliencies are compared per cost saved: what a neuron is worth against
            what its place would buy elsewhere.

    Args:
        plan: What is to be pruned and how far.
        seed: Seed of criteria that are random, or None.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    per_cost = True

    def __init__(self, plan: PruningPlan, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._plan = plan
        self.built = True

    def observe_batch(self, x: Any, mean_losses: MeanLosses) -> None:
        """Called at every step of the prune phase, before `observe_gradient`.

        Args:
            x: Batch of inputs.
            mean_losses: Maps outputs to the losses whose curvature is meant.
        """

    def observe_gradient(self, gradient: Any) -> None:
        """Called at every step of the prune phase with g, shape `(num_gates,)`."""

    def saliency(self) -> Any:
        """What closing each neuron costs, shape `(num_gates,)`."""
        raise NotImplementedError


class KFACCriterion(Criterion):
    """b, with the Kronecker-factored curvature of the gates."""

    def __init__(self, plan: PruningPlan, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plan, seed, **kwargs)
        size = plan.gated.num_gates
        self.curvature = RunningMean(size, _CURVATURE_DECAY, name="curvature")
        self.worth = RunningMean(size, _GRADIENT_DECAY, name="worth")
        self.step = self.add_weight((), "zeros", dtype="int64", trainable=False, name="step")

    def observe_batch(self, x: Any, mean_losses: MeanLosses) -> None:
        x = head_of_batch(x, _BATCH_FRACTION)

        def measure() -> None:
            gated = self._plan.gated
            found = gate_curvature(gated, find_gate_layers(gated), x, mean_losses)
            (mean,) = weighted_mean([found], num_examples(x))
            self.curvature.update(mean)

        cond(tf.equal(self.step % _CURVATURE_EVERY, 0), measure, lambda: None)
        self.step.assign_add(1)

    def observe_gradient(self, gradient: Any) -> None:
        z = self._plan.parameters()
        self.worth.update(-gradient + (z - 0.5) * self.curvature.value())

    def saliency(self) -> Any:
        return self.worth.value()


class TaylorCriterion(Criterion):
    """`E g^2`: the square of the change to first order when the gate is switched."""

    def __init__(self, plan: PruningPlan, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plan, seed, **kwargs)
        self.squares = RunningMean(plan.gated.num_gates, _GRADIENT_DECAY, name="squares")

    def observe_gradient(self, gradient: Any) -> None:
        self.squares.update(tf.square(gradient))

    def saliency(self) -> Any:
        return self.squares.value()


class MagnitudeCriterion(Criterion):
    """Norm of all kernel weights that would go with the neuron (Fang et al. 2023, section 3.3).

    Relative to the mean norm of the neuron's group: kernels of different layers differ in scale.
    """

    per_cost = False

    def saliency(self) -> Any:
        gated = self._plan.gated
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
        means = tf.math.segment_mean(norms, of_neuron)
        return self._plan.to_gates(norms / (tf.gather(means, of_neuron) + _TINY))


class RandomCriterion(Criterion):
    """A random order of the neurons that never changes."""

    per_cost = False

    def __init__(self, plan: PruningPlan, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plan, seed, **kwargs)
        order = np.random.default_rng(seed).permutation(plan.gated.num_gates)
        initializer = keras.initializers.Constant(order.astype("float32"))
        self.order = self.add_weight(order.shape, initializer, trainable=False, name="order")

    def saliency(self) -> Any:
        return tf.convert_to_tensor(self.order)


CRITERION_STATES: dict[str, type[Criterion]] = {
    "kfac": KFACCriterion,
    "taylor": TaylorCriterion,
    "magnitude": MagnitudeCriterion,
    "random": RandomCriterion,
}
