"""Power iteration against dense eigenvectors, and where there is nothing to find."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.linalg import power_iteration


def matrix_of(eigenvalues) -> tuple[np.ndarray, np.ndarray]:
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    return (q * np.asarray(eigenvalues)) @ q.T, q


def test_converges_to_the_dominant_pair_at_the_known_rate():
    matrix, q = matrix_of([4.0, 2.0, 1.0, 0.5])
    start = q.sum(axis=1)
    vector, value = power_iteration(matrix, start, steps=20)
    error = 1 - abs(float(np.dot(vector, q[:, 0])))
    assert error <= 2 * (2.0 / 4.0) ** 40
    assert float(value) == pytest.approx(4.0, rel=1e-10)


def test_warm_starts_add_up():
    matrix, q = matrix_of([3.0, 2.5, 1.0])
    at_once, _ = power_iteration(matrix, q.sum(axis=1), steps=6)
    vector = q.sum(axis=1)
    for _ in range(6):
        vector, _ = power_iteration(matrix, vector, steps=1)
    np.testing.assert_allclose(vector, at_once, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_neither_underflows_nor_overflows_in_float32(scale):
    matrix = (np.diag([2.0, 1.0]) * scale).astype("float32")
    vector, value = power_iteration(matrix, np.ones(2, "float32"), steps=30)
    np.testing.assert_allclose(np.abs(vector), [1.0, 0.0], atol=1e-6)
    assert float(value) == pytest.approx(2.0 * scale, rel=1e-5)


@pytest.mark.parametrize("start", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_start_without_direction_is_replaced(start):
    vector, value = power_iteration(np.diag([2.0, 1.0]), np.array(start), steps=60)
    np.testing.assert_allclose(np.abs(vector), [1.0, 0.0], atol=1e-12)
    assert float(value) == pytest.approx(2.0)


def test_zero_matrix_gives_zero_and_a_unit_vector():
    vector, value = power_iteration(np.zeros((4, 4)), np.array([1.0, 0, 0, 0]))
    assert float(value) == 0.0
    assert np.linalg.norm(vector) == pytest.approx(1.0)


def test_non_finite_matrix_leaves_a_finite_vector_to_go_on_from():
    vector, value = power_iteration(np.full((2, 2), np.nan), np.array([1.0, 0.0]))
    assert np.isfinite(vector).all()
    assert not np.isfinite(value)


def test_runs_inside_a_graph_function():
    matrix, q = matrix_of([4.0, 2.0, 1.0])
    traced = tf.function(lambda m, v: power_iteration(m, v, steps=3))
    eager = power_iteration(matrix, q[:, 1] + q[:, 0], steps=3)
    for one, two in zip(traced(matrix, q[:, 1] + q[:, 0]), eager, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-13)
