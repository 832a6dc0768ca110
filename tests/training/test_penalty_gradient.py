"""The gradient of the penalty against differences of the exact objective, in float64 NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import (
    Batch,
    CurvatureEstimator,
    SingleObjective,
    SpectralRadius,
    find_blocks,
)
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty

B, T, N = 7, 4, 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Case:
    """Tokens x, masked and weighted; logits `tanh(tanh(x W + b) W + b) V + c`, W used twice.

    Args:
        is_masked: Whether some tokens are behind a mask.
        is_weighted: Whether examples count differently.
    """

    def __init__(self, is_masked, is_weighted):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(B, T, N))
        self.y = rng.integers(0, 2, size=(B, T))
        self.mask = np.ones((B, T))
        if is_masked:
            for example, length in enumerate((4, 1, 3, 2, 4, 2, 1)):
                self.mask[example, length:] = 0
        self.x *= self.mask[..., None]
        self.weights = rng.uniform(0.2, 3.0, size=B) if is_weighted else None
        self.values = [rng.normal(size=shape) for shape in ((N, N), (N,), (N, 2), (2,))]

        inputs = keras.Input((T, N))
        shared = keras.layers.Dense(N, "tanh")
        h = keras.layers.Masking()(inputs) if is_masked else inputs
        outputs = keras.layers.Dense(2)(shared(shared(h)))
        self.model = keras.Model(inputs, outputs)
        self.model.set_weights(self.values)

    def factors(self, values):
        """`(A, G)` of both layers, of the empirical Fisher."""
        w, b, v, c = values
        h = [self.x]
        for _ in range(2):
            h.append(np.tanh(h[-1] @ w + b))
        p = np.exp(h[-1] @ v + c)
        p /= p.sum(-1, keepdims=True)
        weights = np.ones(B) if self.weights is None else self.weights
        counts = self.mask * weights[:, None] / self.mask.sum()  # loss = sum counts * losses
        g_last = np.sqrt(B * counts)[..., None] * (p - np.eye(2)[self.y])
        g = [(g_last @ v.T) * (1 - h[2] ** 2)]
        g.append((g[0] @ w.T) * (1 - h[1] ** 2))

        def second_moment(rows, scale):
            return np.einsum("bt,bti,btj->ij", scale, rows, rows)

        def of_inputs(inputs):
            rows = [np.concatenate([a, np.ones((B, T, 1))], -1) for a in inputs]
            scale = self.mask * weights[:, None] / weights.sum()
            return sum(second_moment(r, scale) for r in rows)

        def of_gradients(gradients):
            scale = self.mask / self.mask.sum()
            return sum(second_moment(r, scale) for r in gradients) / len(gradients)

        return [(of_inputs(h[:2]), of_gradients(g)), (of_inputs(h[2:]), of_gradients([g_last]))]

    def penalized(self, values, settings):
        """The radius that the penalty is on."""
        radii = [
            np.prod([np.linalg.eigvalsh(m)[-1] for m in pair]) for pair in self.factors(values)
        ]
        if settings.relative:
            radii = [r * np.sum(k**2) for r, k in zip(radii, values[::2], strict=True)]
        reductions = {"sum": 1, "max": np.inf, "smooth_max": 8}
        return np.linalg.norm(radii, reductions[settings.reduction])

    def gradients(self, settings, step=1e-5):
        """Of `strength * max(0, radius - threshold)`, by central differences."""
        found = []
        for k, value in enumerate(self.values):
            found.append(np.zeros_like(value))
            for place in np.ndindex(value.shape):
                ends = []
                for sign in (1, -1):
                    moved = [v.copy() for v in self.values]
                    moved[k][place] += sign * step
                    above = self.penalized(moved, settings) - settings.threshold
                    ends.append(settings.strength * max(0.0, above))
                found[-1][place] = (ends[0] - ends[1]) / (2 * step)
        return found

    def batch(self):
        weights = None if self.weights is None else self.weights[:, None].astype("float32")
        return Batch(self.x.astype("float32"), self.y, weights)

    def penalty(self, settings):
        """The penalty along the eigenvectors of the dense factors."""
        penalty = CurvaturePenalty(settings, find_blocks(self.model).blocks)
        for k, pair in enumerate(self.factors(self.values)):
            for vectors, matrix in zip((penalty.u, penalty.v), pair, strict=True):
                vectors[k].assign(np.linalg.eigh(matrix)[1][:, -1])
        return penalty

    def estimator(self):
        return CurvatureEstimator(self.model, SingleObjective(LOSS), keras.random.SeedGenerator(0))


def _settings(**settings):
    return SpectralRadius(**{"labels": "data", "every": 3, "batch_fraction": 1.0, **settings})


def _assert_close(found, expected):
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(got), wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("reduction", ["sum", "max", "smooth_max"])
@pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])
@pytest.mark.parametrize(
    ("is_masked", "is_weighted"), [(False, False), (True, True)], ids=["alike", "masked weighted"]
)
def test_the_gradient_is_that_of_the_exact_objective(reduction, relative, is_masked, is_weighted):
    case = Case(is_masked, is_weighted)
    settings = _settings(strength=0.7, reduction=reduction, relative=relative, threshold=0.01)
    assert case.penalized(case.values, settings) > 2 * settings.threshold
    found = case.penalty(settings).gradients(
        case.batch(), case.estimator(), case.model.trainable_variables
    )
    _assert_close(found, case.gradients(settings))


def test_what_is_added_is_the_exact_gradient_held_to_that_of_the_loss():
    case = Case(is_masked=True, is_weighted=True)
    settings = _settings(strength=0.7)
    exact = case.gradients(settings)
    rng = np.random.default_rng(1)
    of_loss, expected = [], []
    for q, size in zip(exact, (1e-2, 10.0, 1e-2, 10.0), strict=True):  # short, long, short, long
        g = rng.normal(size=q.shape)
        g *= size * np.linalg.norm(q) / np.linalg.norm(g)
        of_loss.append(g)
        expected.append(settings.every * min(1.0, 0.6 * size) * q)
    gradients = [tf.constant(g, "float32") for g in of_loss]
    found = case.penalty(settings).added(
        gradients, tf.constant(0), case.batch(), case.estimator(), case.model.trainable_variables
    )
    added = [np.array(f) - np.array(g) for f, g in zip(found, gradients, strict=True)]
    for got, wanted, g in zip(added, expected, of_loss, strict=True):
        tolerance = 3e-5 * np.abs(wanted).max() + 3e-7 * np.abs(g).max()  # float32 of a sum
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)
