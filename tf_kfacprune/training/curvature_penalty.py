"""The spectral-radius penalty inside a training step: eigenvectors, radius and gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import (
    KroneckerBlock,
    SpectralRadius,
    along_gradients,
    layer_spectral_radius,
    per_example_gradients,
)
from tf_kfacprune.training.batches import head_of_batch

__all__ = ["CurvaturePenalty"]

MeanLoss = Callable[[Any, Any], Any]

_TINY = 1e-12
# A radius comes from a fraction of one batch with sampled labels; the figure shown is an average.
_DECAY = 0.95


class CurvaturePenalty(keras.layers.Layer):
    """State of a `SpectralRadius`: warm-started eigenvectors and the average radius.

    The curvature is that of the network as it would be used, in inference mode: with moving
    normalization statistics (second derivatives through batch statistics are wrong in TensorFlow)
    and deterministic gates.

    Args:
        settings: The regularizer.
        network: The network.
        blocks: Kronecker blocks of the network; those of contractions are regularized.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        settings: SpectralRadius,
        network: keras.Model,
        blocks: Sequence[KroneckerBlock],
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.settings = settings
        blocks = tuple(block for block in blocks if block.is_contraction)
        self._target = _Target(network, blocks)
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
        x: Any,
        y: Any,
        mean_loss: MeanLoss,
        variables: Sequence[keras.Variable],
    ) -> list[Any]:
        """Gradient of the penalty at the steps at which it is due, zeros at the others.

        Args:
            step: Number of the training step, a scalar tensor.
            x: Batch of inputs.
            y: Batch of labels.
            mean_loss: `(outputs, y) -> scalar`, the loss whose curvature is meant.
            variables: What to differentiate with respect to.

        Returns:
            One tensor per variable.
        """
        settings = self.settings
        due = tf.equal(step % settings.every, 0)
        x = head_of_batch(x, settings.batch_fraction)
        y = head_of_batch(y, settings.batch_fraction)
        return tf.cond(
            due,
            lambda: self._evaluate(x, y, mean_loss, variables),
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
        self,
        x: Any,
        y: Any,
        mean_loss: MeanLoss,
        variables: Sequence[keras.Variable],
    ) -> list[Any]:
        network, blocks = self._target.network, self._target.blocks
        u = [tf.convert_to_tensor(vector) for vector in self.u]
        v = [tf.convert_to_tensor(vector) for vector in self.v]
        with tf.GradientTape() as tape:
            records, g = per_example_gradients(
                network, x, blocks, lambda outputs: mean_loss(outputs, y), training=False
            )
            uses = [
                (i, record, g_of_record)
                for i, block in enumerate(blocks)
                for record, g_of_record in zip(records, g, strict=True)
                if record.layer is block.layer
            ]
            radii: list[Any] = [0.0] * len(blocks)
            for i, record, g_of_record in uses:
                radii[i] += layer_spectral_radius(blocks[i], record, g_of_record, u[i], v[i])
            radius = self.settings.reduce(radii)
            penalty = self.settings.penalty(self._penalized(radii, radius))
        finite = self._update_average(radius)
        for i, record, g_of_record in uses:
            block = blocks[i]
            to_a = functools.partial(block.project, record)
            to_g = functools.partial(along_gradients, block, record, g_of_record)
            self.u[i].assign(tf.where(finite, _rotate(u[i], to_a), u[i]))
            self.v[i].assign(tf.where(finite, _rotate(v[i], to_g), v[i]))
        if self.settings.strength == 0:
            return [tf.zeros(var.shape, var.dtype) for var in variables]
        return tape.gradient(
            penalty,
            [var.value for var in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    def _penalized(self, radii: Sequence[Any], radius: Any) -> Any:
        """The radius that the penalty is on, relative or not."""
        if not self.settings.relative:
            return radius
        kernels = [tf.convert_to_tensor(block.kernel) for block in self._target.blocks]
        return self.settings.reduce(
            [
                rho * tf.cast(tf.reduce_sum(tf.square(kernel)), "float32")
                for rho, kernel in zip(radii, kernels, strict=True)
            ]
        )


def _rotate(vector: Any, project: Callable[[Any], Any]) -> Any:
    """Half a step of power iteration on `E project project^T`, from one batch.

    The gradient of `1/2 sum (project w)^2` is that matrix times w, without forming it. Averaging
    old and new direction keeps a small batch from shaking the vector.
    """
    with tf.GradientTape() as tape:
        tape.watch(vector)
        energy = 0.5 * tf.reduce_sum(tf.square(project(vector)))
    product = tape.gradient(energy, vector)
    direction = vector + product / (_norm(product) + _TINY)
    rotated = direction / (_norm(direction) + _TINY)
    return tf.where(tf.reduce_all(tf.math.is_finite(rotated)), rotated, vector)


def _norm(vectors: Any) -> Any:
    return tf.norm(vectors, axis=-1, keepdims=True)


class _Target:
    """The network; plain, so that Keras does not track its layers twice."""

    def __init__(self, network: keras.Model, blocks: tuple[KroneckerBlock, ...]) -> None:
        self.network = network
        self.blocks = blocks
