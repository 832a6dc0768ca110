r"""The penalty on the spectral radius within a training: eigenvectors, radius, gradient, steps.

=========  ===================================================================  ===========
symbol     meaning                                                              shape
=========  ===================================================================  ===========
`q`        gradient of the radius by one variable, from a part of one batch     as it
`g`        gradient of the loss                                                 as it
`D`        what the optimizer's last step did to the variable                   as it
`z`        predictions, in coordinates in which the Fisher is flat              any
`mu`, `k`  strength; the penalty is looked at in every k-th step                scalars
=========  ===================================================================  ===========

After every k-th step of the optimizer each variable moves by

    -c k r |D| q / |q|,    r = min(mu |q| / |g|, 0.3),

with the largest c <= 1 for which the predictions move no further than twice as far as in
the optimizer's step: `|z(after) - z| <= 2 |z - z(before)|`.

With r = mu |q| / |g| that is what a gradient descent of rate |D| / |g| on `loss + mu radius` would
add. It stays out of the optimizer, as weight decay does in AdamW: through K-FAC's inverse and
momentum the noise of q in flat directions is multiplied by one over the damping, and second moments
are spoilt by what comes at every k-th step only. The two bounds make any strength safe: gradients
of radius and loss differ by factors of 0.02 to 14 from network to network, and along the steepest
directions, which are those of q, steps as long as the optimizer's change predictions far more.

References:
    Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". You, Gitman, Ginsburg 2017
    (steps in proportion, variable by variable). Schulman et al. 2015 (bounds on predictions).
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
from tf_kfacprune.distribution import weighted_mean

__all__ = ["CurvaturePenalty"]

_TINY = 1e-12
# A radius comes from a fraction of one batch with sampled labels; the figure shown is an average.
_DECAY = 0.95
# Of the length of the optimizer's steps: beyond, flattening outruns the training.
_MOST = 0.3
# As many times as the optimizer's step predictions may move in all. At 4 networks on raw pixels
# came out worse, at 1 others came out hardly any flatter.
_FURTHEST = 2.0
# So many radii make up what a reduction is relative to; there is no penalty before.
_EVALUATIONS_OF_REFERENCE = 20.0


class CurvaturePenalty(keras.layers.Layer):
    """State of a `SpectralRadius`: warm-started eigenvectors, averages of radius and gradients.

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

        def state(name: str, shape: tuple[int, ...] = (), initial: float = 0.0) -> keras.Variable:
            initializer = keras.initializers.Constant(initial)
            name = name.replace("/", "_")
            return self.add_weight(shape, initializer, trainable=False, name=name)

        self.evaluations = state("evaluations")
        self.radius_average = state("radius_average")
        self.penalized_average = state("penalized_average")
        self.reference = state("reference")
        self.u = [
            state(f"{block.name}_u", (*block.group_shape, block.n_a), block.n_a**-0.5)
            for block in blocks
        ]
        self.v = [
            state(f"{block.name}_v", (*block.group_shape, block.n_out), block.n_out**-0.5)
            for block in blocks
        ]
        self.built = True

    def flatten(
        self,
        batch: Batch,
        estimator: CurvatureEstimator,
        variables: Sequence[keras.Variable],
        before: Sequence[Any],
        of_loss: Sequence[Any],
    ) -> None:
        """Looks at the curvature and takes a step down the radius, after one of the optimizer.

        Args:
            batch: The batch.
            estimator: What looks at the network.
            variables: What is trained.
            before: Their values before the optimizer's step, one tensor per variable.
            of_loss: Gradients of the loss there, one tensor per variable, or None.
        """
        part = batch.head(self.settings.batch_fraction)
        gradients = self.gradients(part, estimator, variables)
        if self.settings.strength == 0:
            return
        after = [tf.convert_to_tensor(variable) for variable in variables]
        steps = [
            self._step(new - old, q, g)
            for new, old, q, g in zip(after, before, gradients, of_loss, strict=True)
        ]

        def distance_at(values: Sequence[Any]) -> Any:
            _assign(variables, values)
            there = estimator.coordinates(part)
            return tf.linalg.global_norm([a - b for a, b in zip(here, there, strict=True)])

        def moved(share: Any) -> list[Any]:
            return [
                value - tf.cast(share * step, value.dtype)
                for value, step in zip(after, steps, strict=True)
            ]

        here = estimator.coordinates(part)
        (most,) = weighted_mean([distance_at(before)], part.size)
        share = tf.constant(1.0)
        for _ in range(2):  # predictions saturate, so one proportion may not do
            (distance,) = weighted_mean([distance_at(moved(share))], part.size)
            share *= tf.minimum(1.0, tf.math.divide_no_nan(_FURTHEST * most, distance))
            share = tf.where(tf.math.is_finite(distance), share, 0.0)
        _assign(variables, moved(share))

    def _step(self, change: Any, q: Any, g: Any) -> Any:
        """`k r |D| q / |q|` of one variable, float32; nothing if q is none or not finite."""
        if g is None:
            return tf.zeros(q.shape)
        change, q, g = (tf.cast(tensor, "float32") for tensor in (change, q, g))
        size = tf.norm(q)
        ratio = tf.minimum(self.settings.strength * tf.math.divide_no_nan(size, tf.norm(g)), _MOST)
        length = self.settings.every * ratio * tf.norm(change)
        step = tf.math.divide_no_nan(length, size) * q
        return tf.where(tf.math.is_finite(size), step, tf.zeros_like(step))

    def radius(self) -> Any:
        """The spectral radius, averaged over the last evaluations; a scalar tensor."""
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

    def _debiased(self, average: keras.Variable) -> Any:
        weight = 1.0 - tf.pow(_DECAY, tf.convert_to_tensor(self.evaluations))
        return tf.math.divide_no_nan(tf.convert_to_tensor(average), weight)

    def _count(self, radius: Any, penalized: Any) -> Any:
        """Averages the radii if they are finite, and says so; else they would spoil it."""
        finite = tf.math.is_finite(penalized)
        for average, value in ((self.radius_average, radius), (self.penalized_average, penalized)):
            old = tf.convert_to_tensor(average)
            average.assign(tf.where(finite, old + (1 - _DECAY) * (value - old), old))
        is_reference = tf.logical_and(finite, tf.logical_not(self._knows_reference()))
        part = tf.where(is_reference, penalized / _EVALUATIONS_OF_REFERENCE, 0.0)
        self.reference.assign_add(part)
        self.evaluations.assign_add(tf.cast(finite, "float32"))
        return finite

    def gradients(
        self, batch: Batch, estimator: CurvatureEstimator, variables: Sequence[keras.Variable]
    ) -> list[Any]:
        """Gradients of the penalized radius; eigenvectors and the average radius move on.

        Args:
            batch: The part of a batch to look at.
            estimator: What looks at the network.
            variables: What to differentiate with respect to.

        Returns:
            One tensor per variable, the mean over the replicas.
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
            excess = tf.nn.relu(penalized - self._limit())
        gradients = tape.gradient(
            excess,
            [variable.value for variable in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        along = [
            energy
            for block, uses in zip(blocks, of_blocks, strict=True)
            for energy in (
                functools.partial(energy_of_inputs, block, uses),
                functools.partial(energy_of_gradients, block, uses),
            )
        ]
        vectors = [vector for pair in zip(of_u, of_v, strict=True) for vector in pair]
        products = [_product(vector, energy) for vector, energy in zip(vectors, along, strict=True)]
        # Replicas flatten along the same directions.
        found = weighted_mean([radius, penalized, *products, *gradients], batch.size)
        finite = self._count(found[0], found[1])
        for vector, product in zip(vectors, found[2:], strict=False):
            old = tf.convert_to_tensor(vector)
            vector.assign(tf.where(finite, _rotate(old, product), old))
        return found[2 + len(products) :]

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


def _assign(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value if variable.constraint is None else variable.constraint(value))


def _product(vector: Any, energy: Callable[[Any], Any]) -> Any:
    """`M w` of the matrix of an energy `w^T M w`, as half its gradient, without forming M."""
    w = tf.convert_to_tensor(vector)
    with tf.GradientTape() as tape:
        tape.watch(w)
        total = 0.5 * tf.reduce_sum(energy(w))
    return tape.gradient(total, w)


def _rotate(vector: Any, product: Any) -> Any:
    """Half a step of power iteration, from one batch.

    Averaging old and new direction keeps a small batch from shaking the vector.
    """
    direction = vector + product / (_norm(product) + _TINY)
    rotated = direction / (_norm(direction) + _TINY)
    return tf.where(tf.reduce_all(tf.math.is_finite(rotated)), rotated, vector)


def _norm(vectors: Any) -> Any:
    return tf.norm(vectors, axis=-1, keepdims=True)
