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
    layer_spectral_radius,
    per_example_gradients,
)
from tf_kfacprune.graph import Graph

__all__ = ["CurvaturePenalty", "head_of_batch"]

_TINY = 1e-12
# A radius comes from a fraction of one batch with sampled labels; the figure shown is an average.
_RADIUS_DECAY = 0.95


def head_of_batch(data: Any, fraction: float) -> Any:
    """The first `ceil(fraction * batch)` examples of every tensor in a structure.

    Args:
        data: Structure of tensors with a common batch axis; None stays None.
        fraction: Share of the batch, in (0, 1].
    """
    if fraction == 1.0:
        return data

    def head(tensor: Any) -> Any:
        if tensor is None:
            return None
        batch = tf.cast(tf.shape(tensor)[0], "float32")
        return tensor[: tf.cast(tf.math.ceil(fraction * batch), "int32")]

    return keras.tree.map_structure(head, data)


class CurvaturePenalty(keras.layers.Layer):
    """State of a `SpectralRadius`: warm-started eigenvectors and the average radius.

    The curvature is that of the network as it would be used, in inference mode: with moving
    normalization statistics (second derivatives through batch statistics are wrong in TensorFlow)
    and deterministic gates.

    Args:
        settings: The regularizer.
        graph: The traced network.
        blocks: Kronecker blocks of the network.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        settings: SpectralRadius,
        graph: Graph,
        blocks: Sequence[KroneckerBlock],
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.settings = settings
        self._target = _Target(graph, tuple(blocks))
        self.radius_average = self.add_weight((), "zeros", trainable=False, name="radius_average")
        self.evaluations = self.add_weight((), "zeros", trainable=False, name="evaluations")

        def unit_vector(kind: str, block: KroneckerBlock, n: int) -> keras.Variable:
            initializer = keras.initializers.Constant(n**-0.5)
            name = f"{block.name}_{kind}"
            return self.add_weight((n,), initializer, trainable=False, name=name)

        self.u = [unit_vector("u", block, block.n_a) for block in blocks]
        self.v = [unit_vector("v", block, block.n_out) for block in blocks]
        self.built = True

    def gradients(
        self,
        step: Any,
        x: Any,
        y: Any,
        mean_loss: Callable[[Any, Any], Any],
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
        weight = 1.0 - tf.pow(_RADIUS_DECAY, tf.convert_to_tensor(self.evaluations))
        return tf.convert_to_tensor(self.radius_average) / (weight + _TINY)

    def _evaluate(
        self,
        x: Any,
        y: Any,
        mean_loss: Callable[[Any, Any], Any],
        variables: Sequence[keras.Variable],
    ) -> list[Any]:
        graph, blocks = self._target.graph, self._target.blocks
        u = [tf.convert_to_tensor(vector) for vector in self.u]
        v = [tf.convert_to_tensor(vector) for vector in self.v]
        place = {id(block): i for i, block in enumerate(blocks)}
        with tf.GradientTape() as tape:
            records, g = per_example_gradients(
                graph, x, blocks, lambda outputs: mean_loss(outputs, y), training=False
            )
            radii: list[Any] = [0.0] * len(blocks)
            for record, g_of_record in zip(records, g, strict=True):
                i = place[id(record.block)]
                radii[i] += layer_spectral_radius(record.block, record.x, g_of_record, u[i], v[i])
            radius = self.settings.reduce(radii)
            penalty = self.settings.penalty(radius)
        self.radius_average.assign(
            _RADIUS_DECAY * tf.convert_to_tensor(self.radius_average) + (1 - _RADIUS_DECAY) * radius
        )
        self.evaluations.assign_add(1.0)
        for record, g_of_record in zip(records, g, strict=True):
            i = place[id(record.block)]
            self.u[i].assign(_rotate(u[i], functools.partial(record.block.project, record.x)))
            self.v[i].assign(_rotate(v[i], functools.partial(_along, g_of_record)))
        if self.settings.strength == 0:
            return [tf.zeros(var.shape, var.dtype) for var in variables]
        return tape.gradient(
            penalty,
            [var.value for var in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )


def _along(g: Any, w: Any) -> Any:
    return tf.linalg.matvec(tf.reshape(g, (-1, g.shape[-1])), w)


def _rotate(vector: Any, project: Callable[[Any], Any]) -> Any:
    """Half a step of power iteration on `E project project^T`, from one batch.

    The gradient of `1/2 sum (project w)^2` is that matrix times w, without forming it. Averaging
    old and new direction keeps a small batch from shaking the vector.
    """
    with tf.GradientTape() as tape:
        tape.watch(vector)
        energy = 0.5 * tf.reduce_sum(tf.square(project(vector)))
    product = tape.gradient(energy, vector)
    direction = vector + product / (tf.norm(product) + _TINY)
    rotated = direction / (tf.norm(direction) + _TINY)
    return tf.where(tf.reduce_all(tf.math.is_finite(rotated)), rotated, vector)


class _Target:
    """The network; plain, so that Keras does not track its layers twice."""

    def __init__(self, graph: Graph, blocks: tuple[KroneckerBlock, ...]) -> None:
        self.graph = graph
        self.blocks = blocks
