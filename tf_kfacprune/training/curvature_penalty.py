"""The spectral-radius penalty inside a training step: eigenvectors, radius and gradient."""

from __future__ import annotations

import functools
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
        self.radius_average = self.add_weight((), "zeros", trainable=False, name="radius_average")
        self.evaluations = self.add_weight((), "zeros", trainable=False, name="evaluations")

        def unit_vector(kind: str, block: KroneckerBlock, n: int) -> keras.Variable:
            initializer = keras.initializers.Constant(n**-0.5)
            name = f"{block.name}_{kind}".replace("/", "_")
            shape = (*block.group_shape, n)
            return self.add_weight(shape, initializer, trainable=False, name=name)

        self.u = [unit_vector("u", block, block.n_a) for block in blocks]
        self.v = [unit_vector("v", block, block.n_out) for block in blocks]
        self.built = True

    def gradients(
        self,
        step: Any,
        batch: Batch,
        estimator: CurvatureEstimator,
        variables: Sequence[keras.Variable],
    ) -> list[Any]:
        """Gradient of the penalty at the steps at which it is due, zeros at the others.

        Args:
            step: Number of the training step, a scalar tensor.
            batch: The batch.
            estimator: What looks at the network.
            variables: What to differentiate with respect to.

        Returns:
            One tensor per variable.
        """
        settings = self.settings
        due = tf.equal(step % settings.every, 0)
        return tf.cond(
            due,
            lambda: self._evaluate(batch.head(settings.batch_fraction), estimator, variables),
            lambda: [tf.zeros(v.shape, v.dtype) for v in variables],
        )

    def radius(self) -> Any:
        """The spectral radius, averaged over the last evaluations and debiased; a scalar tensor."""
        weight = 1.0 - tf.pow(_DECAY, tf.convert_to_tensor(self.evaluations))
        return tf.convert_to_tensor(self.radius_average) / (weight + _TINY)

    def _update_average(self, radius: Any) -> Any:
        """Counts a radius if it is finite, and says so; else it would spoil the average."""
        finite = tf.math.is_finite(radius)
        old = tf.convert_to_tensor(self.radius_average)
        self.radius_average.assign(tf.where(finite, _DECAY * old + (1 - _DECAY) * radius, old))
        self.evaluations.assign_add(tf.cast(finite, "float32"))
        return finite

    def _evaluate(
        self, batch: Batch, estimator: CurvatureEstimator, variables: Sequence[keras.Variable]
    ) -> list[Any]:
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
            penalty = self.settings.penalty(self._penalized(blocks, radii, radius))
        finite = self._update_average(radius)
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
