"""Lanczos against dense eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest

from tf_kfacprune.errors import InvalidArgumentError, NonFiniteError
from tf_kfacprune.linalg import lanczos_top, spectral_density


def with_spectrum(eigenvalues, seed: int = 0) -> np.ndarray:
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return (q * np.asarray(eigenvalues, float)) @ q.T


def test_finds_the_largest_eigenpairs_of_an_indefinite_matrix():
    spectrum = np.concatenate([np.linspace(-9.0, 1.0, 60), [3.0, 5.0, 7.0]])
    matrix = with_spectrum(spectrum)
    pairs = lanczos_top(lambda v: matrix @ v, 63, 3, tolerance=1e-10)
    assert pairs.converged
    np.testing.assert_allclose(pairs.eigenvalues, [7.0, 5.0, 3.0], rtol=1e-12)
    for value, vector in zip(pairs.eigenvalues, pairs.eigenvectors, strict=True):
        np.testing.assert_allclose(matrix @ vector, value * vector, rtol=0, atol=1e-8)


def test_reported_residuals_are_the_true_ones():
    matrix = with_spectrum(np.linspace(0, 1, 200))
    pairs = lanczos_top(lambda v: matrix @ v, 200, 2, max_steps=12, tolerance=1e-12)
    assert not pairs.converged
    assert pairs.steps == 12
    true = np.linalg.norm(
        pairs.eigenvectors @ matrix - pairs.eigenvalues[:, None] * pairs.eigenvectors, axis=1
    )
    np.testing.assert_allclose(pairs.residuals, true, rtol=1e-8)


def test_clustered_large_spectrum_yields_no_spurious_copies():
    matrix = with_spectrum(np.concatenate([np.linspace(0, 1, 300), [10.0, 1000.0]]))
    pairs = lanczos_top(lambda v: matrix @ v, 302, 3, max_steps=150, tolerance=1e-6)
    np.testing.assert_allclose(pairs.eigenvalues[:2], [1000.0, 10.0], rtol=1e-10)
    assert pairs.eigenvalues[2] <= 1.0 + 1e-9


@pytest.mark.parametrize("spectrum", [[0.0] * 5, [2.0] * 5, [3.0, 3.0, -1.0], [4.0]])
def test_an_invariant_subspace_ends_the_search_exactly(spectrum):
    matrix = with_spectrum(spectrum)
    pairs = lanczos_top(lambda v: matrix @ v, len(spectrum), 1)
    assert pairs.converged
    np.testing.assert_allclose(pairs.eigenvalues, [max(spectrum)], atol=1e-12)
    assert pairs.steps <= len(set(spectrum)) + 1


def test_full_dimension_reproduces_the_whole_spectrum():
    spectrum = np.linspace(-2, 3, 12)
    matrix = with_spectrum(spectrum)
    pairs = lanczos_top(lambda v: matrix @ v, 12, 12, max_steps=50)
    np.testing.assert_allclose(pairs.eigenvalues, spectrum[::-1], rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_digits():
    matrix = with_spectrum(np.linspace(0, 1, 30))
    one, two = (lanczos_top(lambda v: matrix @ v, 30, 2, max_steps=9, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.eigenvalues, two.eigenvalues)


def test_density_is_exact_when_the_basis_is_complete():
    spectrum = np.array([-1.0, 0.5, 2.0, 8.0])
    matrix = with_spectrum(spectrum)
    density = spectral_density(lambda v: matrix @ v, 4, steps=10, probes=3)
    np.testing.assert_allclose(np.unique(density.nodes.round(10)), spectrum)
    np.testing.assert_allclose(density.weights.sum(), 1.0, rtol=1e-13)


def test_density_moments_estimate_normalized_traces():
    matrix = with_spectrum(np.linspace(0.0, 2.0, 400))
    density = spectral_density(lambda v: matrix @ v, 400, steps=30, probes=8)
    for power in (1, 2, 3):
        expected = np.trace(np.linalg.matrix_power(matrix, power)) / 400
        assert density.moment(power) == pytest.approx(expected, rel=0.05)


def test_smoothed_density_integrates_to_one_and_peaks_where_the_mass_is():
    matrix = with_spectrum([1.0] * 45 + [5.0] * 5)
    density = spectral_density(lambda v: matrix @ v, 50, probes=16)
    grid = np.linspace(-1, 7, 4001)
    values = density.smoothed(grid, 0.1)
    assert np.trapezoid(values, grid) == pytest.approx(1.0, abs=1e-9)
    assert grid[np.argmax(values)] == pytest.approx(1.0, abs=0.01)


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(NonFiniteError, match="step 1"):
        lanczos_top(lambda v: v * np.nan, 3)


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 4}, {"k": 1.5}, {"k": 3, "max_steps": 2}])
def test_numbers_that_do_not_fit_are_named(arguments):
    with pytest.raises(InvalidArgumentError, match="must be an integer, at least"):
        lanczos_top(lambda v: v, 3, **arguments)
