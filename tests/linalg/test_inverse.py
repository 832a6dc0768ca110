"""Damped inverses: exact where the matrix is good, finite where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_kfacprune.linalg import damped_inverse


def with_spectrum(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return (q * eigenvalues) @ q.T


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_equals_the_dense_inverse_in_float64(damping):
    matrix = with_spectrum(np.linspace(0.1, 4.0, 12))
    expected = np.linalg.inv(matrix + damping * np.eye(12))
    np.testing.assert_allclose(damped_inverse(matrix, damping), expected, rtol=1e-11, atol=1e-12)


def test_float32_error_is_bounded_by_the_condition_number():
    matrix = with_spectrum(np.geomspace(1e-3, 1.0, 30))
    result = damped_inverse(matrix.astype("float32"), 1e-3)
    expected = np.linalg.inv(matrix + 1e-3 * np.eye(30))
    condition = (1.0 + 1e-3) / (2e-3)
    error = np.linalg.norm(result - expected, 2) / np.linalg.norm(expected, 2)
    assert error <= 4 * condition * np.finfo("float32").eps * np.sqrt(30)


def test_asymmetric_rounding_is_removed_and_the_result_is_symmetric():
    matrix = with_spectrum(np.linspace(1.0, 2.0, 6))
    skew = np.triu(np.ones((6, 6)), 1) * 0.01
    result = np.array(damped_inverse(matrix + skew - skew.T, 0.0))
    np.testing.assert_allclose(result, np.linalg.inv(matrix), rtol=1e-12)


def test_rank_deficient_matrix_without_damping_is_finite_and_inverts_its_range():
    matrix = with_spectrum(np.array([0.0, 0.0, 1.0, 2.0]))
    result = np.array(damped_inverse(matrix, 0.0))
    assert np.isfinite(result).all()
    np.testing.assert_allclose(matrix @ result @ matrix, matrix, rtol=0, atol=1e-5)


def test_slightly_indefinite_matrix_is_repaired_by_jitter():
    matrix = with_spectrum(np.array([-1e-6, 0.5, 1.0])).astype("float32")
    result = np.array(damped_inverse(matrix, 1e-9))
    assert np.isfinite(result).all()
    assert np.linalg.eigvalsh(result).min() > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_matrix_gives_zeros(value):
    matrix = np.eye(3, dtype="float32")
    matrix[1, 2] = value
    np.testing.assert_array_equal(damped_inverse(matrix, 1e-3), np.zeros((3, 3)))


def test_zero_matrix_inverts_to_its_damping_or_to_zero():
    zero = np.zeros((3, 3), "float32")
    np.testing.assert_allclose(damped_inverse(zero, 0.5), 2.0 * np.eye(3), rtol=1e-6)
    np.testing.assert_array_equal(damped_inverse(zero, 0.0), zero)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_runs_inside_a_graph_function(jit_compile):
    traced = tf.function(damped_inverse, jit_compile=jit_compile)
    good = with_spectrum(np.linspace(0.5, 2.0, 5)).astype("float32")
    bad = with_spectrum(np.array([-0.5, 0.1, 1.0, 1.0, 1.0])).astype("float32")
    np.testing.assert_allclose(traced(good, tf.constant(0.1)), damped_inverse(good, 0.1), rtol=1e-5)
    assert np.isfinite(traced(bad, tf.constant(1e-8))).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(-12, 12),
    smallest=st.floats(-1.0, 1.0),
    damping=st.sampled_from([0.0, 1e-12, 1e-3, 1.0]),
)
def test_any_finite_symmetric_matrix_gives_a_finite_positive_definite_inverse(
    seed, scale, smallest, damping
):
    eigenvalues = np.array([smallest, 0.5, 1.0, 1.0])
    matrix = (10.0**scale * with_spectrum(eigenvalues, seed)).astype("float32")
    result = np.array(damped_inverse(matrix, damping), "float64")
    assert np.isfinite(result).all()
    assert np.linalg.eigvalsh(result).min() > -1e-5 * np.abs(result).max()
    assert np.abs(result).max() > 0
