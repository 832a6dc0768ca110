r"""The spectral-radius penalty inside a training step: eigenvectors, radius and gradient.

At every k-th step the gradient q of the penalty is added, with weight k, to that of the loss, g,
variable by variable and never larger than a share of it:

    g + k min(1, s |g| / |q|) q.

It takes the optimizer's way, because that is how flat directions are gone far in which flattening
costs little; steps of its own beside the optimizer's (as weight decay has in AdamW) hardly
flattened anything. The bound makes any strength safe: |q| / |g| is 0.02 in one network and 14 in
another, most of all at the start with inputs that are not normalized.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import (
    Batch,
    CurvatureEstimator,
    KroneckerBlock,
    SpectralRadius,
    energy_of_gradients,
    energy_of_inputs,
    layer_spectral_radius,
    twice_differentiable,
)

__all__ = ["CurvaturePenalty"]

_TINY = 1e-12
# A radius comes from a fraction of one batch with sampled labels; the figure shown is an average.
_DECAY = 0.95
# s, chosen on digits and MNIST: 0.3 flattened less, 1 harmed training on pixels from 0 to 16.
_LARGEST_SHARE = 0.6
# BatchNormalization makes another function of a smaller part of a batch.
_LEAST_EXAMPLES = 16
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

        def unit_vector(kind: str, block: KroneckerBlock, n: int) -> keras.Variable:
            initializer = keras.initializers.Constant(n**-0.5)
            name = f"{block.name}_{kind}".replace("/", "_")
            shape = (*block.group_shape, n)
            return self.add_weight(shape, initializer, trainable=False, name=name)

        self.u = [unit_vector("u", block, block.n_a) for block in blocks]
        self.v = [unit_vector("v", block, block.n_out) for block in blocks]
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
            gradients: Those of the loss, one tensor per variable, or None.
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
            part = batch.head(settings.batch_fraction, _LEAST_EXAMPLES)
            found = self.gradients(part, estimator, variables)
            return [
                settings.every * _bounded(q * tf.cast(scale, q.dtype), g)
                for q, g in zip(found, gradients, strict=True)
            ]

        to_add = tf.cond(
            tf.equal(step % settings.every, 0),
            of_penalty,
            lambda: [tf.zeros(v.shape, v.dtype) for v in variables],
        )
        return [
            None if g is None else g + added for g, added in zip(gradients, to_add, strict=True)
        ]

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
            batch: The part of a batch to look at.
            estimator: What looks at the network.
            variables: What to differentiate with respect to.

        Returns:
            One tensor per variable.
        """
        members = [k for k, block in enumerate(self._blocks()) if block.kernel.trainable]
        blocks = [self._blocks()[k] for k in members]
        of_u, of_v = [self.u[k] for k in members], [self.v[k] for k in members]
        u, v = ([tf.convert_to_tensor(vector) for vector in vectors] for vectors in (of_u, of_v))
        with twice_differentiable(estimator.network), tf.GradientTape() as tape:
            look = estimator.look(batch, blocks, self.settings.labels, training=True)
            of_blocks = [look.of(block.layer) for block in blocks]
            radii = [
                layer_spectral_radius(block, uses, u[k], v[k])
                for k, (block, uses) in enumerate(zip(blocks, of_blocks, strict=True))
            ]
            radius = self.settings.reduce(radii)
            penalized = self._penalized(blocks, radii, radius)
            penalty = self.settings.strength * tf.nn.relu(penalized - self._limit())
        finite = self._count(radius, penalized)
        for k, (block, uses) in enumerate(zip(blocks, of_blocks, strict=True)):
            along_a = functools.partial(energy_of_inputs, block, uses)
            along_g = functools.partial(energy_of_gradients, block, uses)
            of_u[k].assign(tf.where(finite, _rotate(u[k], along_a), u[k]))
            of_v[k].assign(tf.where(finite, _rotate(v[k], along_g), v[k]))
        if self.settings.strength == 0:
            return [tf.zeros(var.shape, var.dtype) for var in variables]
        return tape.gradient(
            penalty,
            [var.value for var in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    def _penalized(
        self, blocks: Sequence[KroneckerBlock], radii: Sequence[Any], radius: Any
    ) -> Any:
        """The radius that the penalty is on, relative or not."""
        if not self.settings.relative:
            return radius
        kernels = [tf.convert_to_tensor(block.kernel) for block in blocks]
        return self.settings.reduce(
            [
                rho * tf.cast(tf.reduce_sum(tf.square(kernel)), "float32")
                for rho, kernel in zip(radii, kernels, strict=True)
            ]
        )


def _bounded(q: Any, g: Any) -> Any:
    """`min(1, s |g| / |q|) q`, nothing if there is no g or q is not finite."""
    if g is None:
        return tf.zeros_like(q)
    size = tf.norm(tf.cast(q, "float32"))
    largest = _LARGEST_SHARE * tf.norm(tf.cast(g, "float32"))
    share = tf.minimum(1.0, tf.math.divide_no_nan(largest, size))
    return tf.where(tf.math.is_finite(size), tf.cast(share, q.dtype) * q, tf.zeros_like(q))


def _rotate(vector: Any, energy: Callable[[Any], Any]) -> Any:
    """Half a step of power iteration on the matrix M of an energy `w^T M w`, from one batch.

    Half the energy's gradient is `M w`, without forming M. Averaging old and new direction keeps a
    small batch from shaking the vector.
    """
    with tf.GradientTape() as tape:
        tape.watch(vector)
        total = 0.5 * tf.reduce_sum(energy(vector))
    product = tape.gradient(total, vector)
    direction = vector + product / (_norm(product) + _TINY)
    rotated = direction / (_norm(direction) + _TINY)
    return tf.where(tf.reduce_all(tf.math.is_finite(rotated)), rotated, vector)


def _norm(vectors: Any) -> Any:
    return tf.norm(vectors, axis=-1, keepdims=True)
