"""Factored damping against dense float64 matrices."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.linalg import damped_inverse, factored_damping


def random_spd(n: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(n, 2 * n))
    return root @ root.T / (2 * n)


def _mean(matrix):
    """Mean eigenvalue."""
    return keras.ops.convert_to_tensor(np.trace(matrix) / len(matrix))


def test_preconditioning_with_damped_inverses_solves_the_damped_system():
    a, g = random_spd(6, 4), random_spd(4, 5)
    v = np.random.default_rng(6).normal(size=(6, 4))
    damping_a, damping_g = factored_damping(_mean(a), _mean(g), 0.07)
    solved = damped_inverse(a, damping_a) @ v @ damped_inverse(g, damping_g)
    dense = np.kron(a + float(damping_a) * np.eye(6), g + float(damping_g) * np.eye(4))
    expected = np.linalg.solve(dense, v.ravel()).reshape(6, 4)
    np.testing.assert_allclose(solved, expected, rtol=1e-10, atol=1e-12)


def test_damping_is_split_by_the_ratio_of_mean_eigenvalues():
    a, g, damping = 9.0 * random_spd(6, 7), random_spd(4, 8), 0.3
    damping_a, damping_g = factored_damping(_mean(a), _mean(g), damping)
    pi = np.sqrt((np.trace(a) / 6) / (np.trace(g) / 4))
    np.testing.assert_allclose(float(damping_a), pi * np.sqrt(damping), rtol=1e-14)
    np.testing.assert_allclose(float(damping_a) * float(damping_g), damping, rtol=1e-14)


@pytest.mark.parametrize("which", ["left", "right", "both", "nan"])
def test_damping_is_even_where_a_trace_says_nothing(which):
    a = random_spd(3, 9) * (0.0 if which in ("left", "both") else 1.0)
    g = random_spd(3, 10) * (0.0 if which in ("right", "both") else 1.0)
    if which == "nan":
        a = a * np.nan
    np.testing.assert_allclose(
        [float(d) for d in factored_damping(_mean(a), _mean(g), 0.25)], [0.5, 0.5]
    )
