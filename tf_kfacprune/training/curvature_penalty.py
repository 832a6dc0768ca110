r"""The spectral-radius penalty inside a training step: eigenvectors, radius and gradient.

At every k-th step the gradient q of the penalty is added, with weight k, to that of the loss, g,
variable by variable and never larger than a share of it:

    g + k min(1, s |g| / |q|) q.

It takes the optimizer's way, because that is how flat directions are gone far in which flattening
costs little; steps of its own beside the optimizer's (as weight decay has in AdamW) hardly
flattened anything. The bound makes any strength safe: |q| / |g| is 0.02 in one network and 14 in
another, most of all at the start with inputs that are not normalized.

=========  ===================================================================  ==============
symbol     meaning                                                              shape
=========  ===================================================================  ==============
`e`        energies `u^T A u` and `v^T G v` of all blocks, means over examples  (groups,) each
`P(e, W)`  the penalty, which depends on examples through e alone               scalar
`q`        its gradient, `sum_e dP/de de/dW + dP/dW`                            as W
=========  ===================================================================  ==============

Under `tf.distribute` e is the mean over all replicas, dP/de is the same on each of them, and q is
the mean of what they find by `de/dW` of their own examples. So they flatten along the same
directions, with the q of one device that has all examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_kfacprune.curvature import (
    LEAST_EXAMPLES,
    Batch,
    CurvatureEstimator,
    KroneckerBlock,
    Look,
    SpectralRadius,
    energy_of_gradients,
    energy_of_inputs,
    twice_differentiable,
)
from tf_kfacprune.distribution import cond, num_replicas, sum_over_replicas, weighted_mean

__all__ = ["CurvaturePenalty"]

_TINY = 1e-12
# A radius comes from a fraction of one batch with sampled labels; the figure shown is an average.
_DECAY = 0.95
# s, chosen on digits and MNIST: 0.3 flattened less, 1 harmed training on pixels from 0 to 16.
_LARGEST_SHARE = 0.6
# So many radii make up what a reduction is relative to; there is no penalty before.
_EVALUATIONS_OF_REFERENCE = 20.0


class CurvaturePenalty(keras.layers.Layer):
    """State of a `SpectralRadius`: warm-started eigenvectors and the average radius.

    The curvature is that of the network that is trained, in training mode. With the moving
    statistics of normalizations for constants, kernels in front of them would be pulled to where
    the trained function does not change at all: networks came out sharper.

    Args:
        settings: The regularizer.
        blocks: Kronecker blocks of the network; those of contractions that are trainable when the
            step is traced are regularized.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        settings: SpectralRadius,
        blocks: Sequence[KroneckerBlock],
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.settings = settings
        blocks = tuple(block for block in blocks if block.is_contraction)
        self._blocks = lambda: blocks  # Keras would track the layers in a tuple

        def scalar(name: str) -> keras.Variable:
            return self.add_weight((), "zeros", trainable=False, name=name)

        self.evaluations = scalar("evaluations")
        self.radius_average = scalar("radius_average")
        self.penalized_average = scalar("penalized_average")
        self.reference = scalar("reference")

        def unit_vector(kind: str, block: KroneckerBlock, start: Any) -> keras.Variable:
            initializer = keras.initializers.Constant(start / np.linalg.norm(start))
            name = f"{block.name}_{kind}".replace("/", "_")
            shape = (*block.group_shape, len(start))
            return self.add_weight(shape, initializer, trainable=False, name=name)

        def drawn(n: int) -> Any:
            # Not a constant vector: gradients of softmax sum to 0, so that G has it in its null
            # space, and it would turn to wherever rounding points.
            return np.random.default_rng(0).normal(size=n)

        self.u = [unit_vector("u", block, np.ones(block.n_a)) for block in blocks]
        self.v = [unit_vector("v", block, drawn(block.n_out)) for block in blocks]
        self.built = True

    def added(
        self,
        gradients: Sequence[Any],
        step: Any,
        batch: Batch,
        estimator: CurvatureEstimator,
        variables: Sequence[keras.Variable],
        scale: Any = 1.0,
    ) -> list[Any]:
        """Gradients with that of the penalty added, at the steps at which it is due.

        Args:
            gradients: Those of the loss, one tensor per variable, or None; under `tf.distribute`
                this replica's parts of them, whose sum they are.
            step: Number of the training step, a scalar tensor.
            batch: The batch.
            estimator: What looks at the network.
            variables: What they are with respect to.
            scale: What the loss is multiplied by.

        Returns:
            One tensor per variable; None stays None.
        """
        settings = self.settings

        def of_penalty() -> list[Any]:
            part = batch.head(settings.batch_fraction, LEAST_EXAMPLES)
            found = self.gradients(part, estimator, variables)
            whole = sum_over_replicas(gradients)
            weight = settings.every / num_replicas()  # they will be summed
            return [
                weight * _bounded(q * tf.cast(scale, q.dtype), g)
                for q, g in zip(found, whole, strict=True)
            ]

        to_add = cond(
            tf.equal(step % settings.every, 0),
            of_penalty,
            lambda: [tf.zeros(v.shape, v.dtype) for v in variables],
        )
        return [
            None if g is None else g + added for g, added in zip(gradients, to_add, strict=True)
        ]

    def go_on_from(self, other: CurvaturePenalty) -> None:
        """Takes over how far the radius of the same network, at another size, has come down.

        Args:
            other: The penalty on it so far.
        """
        for name in ("evaluations", "radius_average", "penalized_average", "reference"):
            getattr(self, name).assign(getattr(other, name))

    def radius(self) -> Any:
        """The spectral radius, averaged over the last evaluations and debiased; a scalar tensor."""
        return self._debiased(self.radius_average)

    def figures(self) -> dict[str, Any]:
        """What is shown while training: `spectral_radius`, and how far a reduction has got."""
        figures = {"spectral_radius": self.radius()}
        if self.settings.reduction_to is not None:
            share = tf.math.divide_no_nan(
                self._debiased(self.penalized_average), tf.convert_to_tensor(self.reference)
            )
            figures["radius_reduction"] = tf.where(self._knows_reference(), share, 1.0)
        return figures

    def _debiased(self, average: keras.Variable) -> Any:
        weight = 1.0 - tf.pow(_DECAY, tf.convert_to_tensor(self.evaluations))
        return tf.convert_to_tensor(average) / (weight + _TINY)

    def _knows_reference(self) -> Any:
        return tf.convert_to_tensor(self.evaluations) >= _EVALUATIONS_OF_REFERENCE

    def _limit(self) -> Any:
        """The penalized radius below which there is no penalty, a scalar tensor."""
        share = self.settings.reduction_to
        if share is None:
            return tf.constant(self.settings.threshold, "float32")
        asked = share * tf.convert_to_tensor(self.reference)
        asked = tf.maximum(asked, self.settings.threshold)
        return tf.where(self._knows_reference(), asked, math.inf)

    def _count(self, radius: Any, penalized: Any) -> Any:
        """Averages the radii if they are finite, and says so; else they would spoil it."""
        finite = tf.logical_and(tf.math.is_finite(radius), tf.math.is_finite(penalized))
        for average, value in ((self.radius_average, radius), (self.penalized_average, penalized)):
            old = tf.convert_to_tensor(average)
            average.assign(tf.where(finite, _DECAY * old + (1 - _DECAY) * value, old))
        is_reference = tf.logical_and(finite, tf.logical_not(self._knows_reference()))
        self.reference.assign_add(
            tf.where(is_reference, penalized / _EVALUATIONS_OF_REFERENCE, 0.0)
        )
        self.evaluations.assign_add(tf.cast(finite, "float32"))
        return finite

    def gradients(
        self, batch: Batch, estimator: CurvatureEstimator, variables: Sequence[keras.Variable]
    ) -> list[Any]:
        """Gradient of the penalty; eigenvectors and the average radius move on.

        Args:
            batch: The part of a batch to look at; under `tf.distribute`, of this replica's.
            estimator: What looks at the network.
            variables: What to differentiate with respect to.

        Returns:
            One tensor per variable, the same on all replicas.
        """
        members = [k for k, block in enumerate(self._blocks()) if block.kernel.trainable]
        blocks = [self._blocks()[k] for k in members]
        vectors = [self.u[k] for k in members] + [self.v[k] for k in members]
        along = [tf.convert_to_tensor(vector) for vector in vectors]
        values = [variable.value for variable in variables]
        # Replicas share the layers that are called differently within, so they must not meet there.
        with twice_differentiable(estimator.network), tf.GradientTape() as of_examples:
            look = estimator.look(batch, blocks, self.settings.labels, training=True)
            own = _energies(blocks, look, along)
        shares = _shares(look, len(blocks))
        energies = weighted_mean(_scaled(own, shares), look.examples)
        with tf.GradientTape() as of_whole:
            of_whole.watch(energies)
            radius, penalized = self._radii(blocks, energies)
            penalty = self.settings.strength * tf.nn.relu(penalized - self._limit())
        finite = self._count(radius, penalized)
        products = weighted_mean(_scaled(_products(blocks, look, along), shares), look.examples)
        for vector, old, product in zip(vectors, along, products, strict=True):
            vector.assign(tf.where(finite, _rotated(old, product), old))
        if self.settings.strength == 0:
            return [tf.zeros(var.shape, var.dtype) for var in variables]
        by_energies, by_values = of_whole.gradient(
            penalty, [energies, values], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        through_energies = of_examples.gradient(
            own,
            values,
            output_gradients=_scaled(by_energies, shares),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        through_energies = weighted_mean(through_energies, look.examples)
        return [tf.add(*parts) for parts in zip(through_energies, by_values, strict=True)]

    def _radii(self, blocks: Sequence[KroneckerBlock], energies: Sequence[Any]) -> tuple[Any, Any]:
        """The spectral radius, and the one that the penalty is on: relative or not."""
        of_inputs, of_gradients = energies[: len(blocks)], energies[len(blocks) :]
        radii = [tf.reduce_max(a * g) for a, g in zip(of_inputs, of_gradients, strict=True)]
        radius = self.settings.reduce(radii)
        if not self.settings.relative:
            return radius, radius
        kernels = [tf.convert_to_tensor(block.kernel) for block in blocks]
        relative = [
            rho * tf.cast(tf.reduce_sum(tf.square(kernel)), "float32")
            for rho, kernel in zip(radii, kernels, strict=True)
        ]
        return radius, self.settings.reduce(relative)


def _energies(blocks: Sequence[KroneckerBlock], look: Look, along: Sequence[Any]) -> list[Any]:
    """`u^T A u` of all blocks and `v^T G v` of all blocks; `along` has all u, then all v."""
    uses = [look.of(block.layer) for block in blocks]
    u, v = along[: len(blocks)], along[len(blocks) :]
    return [
        *(energy_of_inputs(*place) for place in zip(blocks, uses, u, strict=True)),
        *(energy_of_gradients(*place) for place in zip(blocks, uses, v, strict=True)),
    ]


def _products(blocks: Sequence[KroneckerBlock], look: Look, along: Sequence[Any]) -> list[Any]:
    """`A u` and `G v`, without forming A and G: half the gradients of the energies."""
    with tf.GradientTape() as tape:
        tape.watch(along)
        halves = [0.5 * energy for energy in _energies(blocks, look, along)]
    return tape.gradient(halves, along)


def _shares(look: Look, count: int) -> list[Any]:
    """What energies of this replica count beyond its number of examples: `count` of A, then of G.

    An energy of A is a mean by the weights of this replica's examples; an energy of G has them in
    the gradients.
    """
    share = tf.constant(1.0)
    if look.weights is not None and num_replicas() > 1:
        own = tf.reduce_sum(look.weights)  # derivatives of a mean: their sum is a mean weight
        (of_all,) = weighted_mean([own], look.examples)
        share = tf.math.divide_no_nan(own, of_all)
    return [share] * count + [tf.constant(1.0)] * count


def _scaled(tensors: Sequence[Any], shares: Sequence[Any]) -> list[Any]:
    return [share * tensor for tensor, share in zip(tensors, shares, strict=True)]


def _bounded(q: Any, g: Any) -> Any:
    """`min(1, s |g| / |q|) q`, nothing if there is no g or q is not finite."""
    if g is None:
        return tf.zeros_like(q)
    size = tf.norm(tf.cast(q, "float32"))
    largest = _LARGEST_SHARE * tf.norm(tf.cast(g, "float32"))
    share = tf.minimum(1.0, tf.math.divide_no_nan(largest, size))
    return tf.where(tf.math.is_finite(size), tf.cast(share, q.dtype) * q, tf.zeros_like(q))


def _rotated(vector: Any, product: Any) -> Any:
    """Half a step of power iteration from w, by the product `M w` with the matrix of one batch.

    Averaging old and new direction keeps a small batch from shaking the vector.
    """
    direction = vector + product / (_norm(product) + _TINY)
    rotated = direction / (_norm(direction) + _TINY)
    return tf.where(tf.reduce_all(tf.math.is_finite(rotated)), rotated, vector)


def _norm(vectors: Any) -> Any:
    return tf.norm(vectors, axis=-1, keepdims=True)
