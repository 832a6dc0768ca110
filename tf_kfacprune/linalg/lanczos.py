"""Lanczos: extreme eigenvalues and spectral density of a matrix known only by its products.

========  ==============================================================  ===========
symbol    meaning                                                         shape
========  ==============================================================  ===========
``M``     symmetric matrix, given as the product ``v -> M v``             (n, n)
``Q``     orthonormal Krylov basis, one vector per row                    (m, n)
``T``     tridiagonal matrix ``Q M Q^T``                                  (m, m)
``theta`` eigenvalues of T (Ritz values), S their eigenvectors            (m,)
========  ==============================================================  ===========

Everything is float64 NumPy, with full reorthogonalization: m is small (tens to a few hundred),
and without it converged eigenvalues come back as spurious copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from tf_kfacprune.errors import InvalidArgumentError, NonFiniteError

__all__ = ["RitzPairs", "SpectralDensity", "lanczos_top", "spectral_density"]

Vector = NDArray[np.float64]
MatVec = Callable[[Vector], Vector]

# A direction shorter than this, relative to the matrix, is rounding: the basis is complete.
_BREAKDOWN = 1e-12


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs.

    Attributes:
        eigenvalues: Ritz values in descending order, shape (k,).
        eigenvectors: Unit Ritz vectors, one per row, shape (k, n).
        residuals: ``|M v - theta v|`` of each pair, shape (k,): an eigenvalue of M lies within
            this distance of theta.
        steps: Number of products that were used.
        converged: Whether all residuals are within the tolerance.
    """

    eigenvalues: Vector
    eigenvectors: NDArray[np.float64]
    residuals: Vector
    steps: int
    converged: bool


@dataclass(frozen=True)
class SpectralDensity:
    """Quadrature for the distribution of the eigenvalues: point masses that sum to 1.

    Attributes:
        nodes: Ritz values of all probes in ascending order, shape (p * m,).
        weights: Mass at each node, shape (p * m,); they sum to 1.
    """

    nodes: Vector
    weights: Vector

    def moment(self, power: int) -> float:
        """``tr(M^power) / n``, as the quadrature sees it."""
        return float(self.weights @ self.nodes**power)

    def smoothed(self, grid: Vector, width: float) -> Vector:
        """The density as a mixture of Gaussians.

        Args:
            grid: Where to evaluate it, shape (g,).
            width: Standard deviation of each Gaussian, > 0, in the units of the eigenvalues.

        Returns:
            Density at the grid points, shape (g,); it integrates to 1 over the real line.
        """
        scaled = (np.asarray(grid)[:, None] - self.nodes) / width
        return np.exp(-0.5 * scaled**2) @ self.weights / (width * np.sqrt(2 * np.pi))


class _Krylov:
    """The growing Krylov basis of one start vector."""

    def __init__(self, matvec: MatVec, start: Vector, capacity: int) -> None:
        self._matvec = matvec
        self._basis = np.empty((capacity, start.size))
        self._basis[0] = start / np.linalg.norm(start)
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self._next: Vector | None = self._basis[0]

    @property
    def size(self) -> int:
        return len(self.diagonal)

    @property
    def basis(self) -> NDArray[np.float64]:
        return self._basis[: self.size]

    @property
    def complete(self) -> bool:
        """Whether the basis spans an invariant subspace, so that its Ritz values are exact."""
        return self._next is None

    def extend(self) -> None:
        """Adds the next vector: one product with M."""
        if self._next is None:
            return
        m = self.size
        self._basis[m] = self._next
        image = np.asarray(self._matvec(self._next.copy()), np.float64)
        if not np.isfinite(image).all():
            raise NonFiniteError(
                f"Lanczos step {m + 1}: the matrix-vector product has NaN or infinite entries. "
                "Check the parameters and the data for non-finite values."
            )
        self.diagonal.append(float(self._next @ image))
        scale = float(np.linalg.norm(image))
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            image = image - self.basis.T @ (self.basis @ image)
        length = float(np.linalg.norm(image))
        full = self.size == self._next.size
        largest = max(scale, max(map(abs, self.diagonal)), *map(abs, self.off_diagonal), 0.0)
        self.off_diagonal.append(length)
        self._next = None if full or length <= _BREAKDOWN * largest else image / length

    def ritz(self) -> tuple[Vector, NDArray[np.float64]]:
        """Eigenvalues (ascending) and eigenvectors (columns) of T."""
        inner = self.off_diagonal[:-1]
        matrix = np.diag(self.diagonal) + np.diag(inner, 1) + np.diag(inner, -1)
        return np.linalg.eigh(matrix)


def lanczos_top(
    matvec: MatVec,
    dimension: int,
    k: int = 1,
    *,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> RitzPairs:
    """Finds the k largest (most positive) eigenvalues of a symmetric matrix.

    Stops as soon as every residual is at most ``tolerance`` times the largest of the k Ritz values
    in absolute terms, or after ``max_steps`` products. The random start almost surely meets every
    eigenspace, but one start yields one eigenvector of each: a repeated eigenvalue counts once.
    Memory: ``max_steps * n`` numbers of 8 bytes.

    Args:
        matvec: The product ``v -> M v`` on float64 vectors of shape (n,).
        dimension: n.
        k: Number of eigenvalues wanted, 1 <= k <= n; fewer come back if M has fewer distinct
            ones.
        max_steps: Largest number of products, at least k.
        tolerance: Relative residual at which to stop.
        seed: Seed of the start vector.

    Returns:
        The `RitzPairs`.

    Raises:
        InvalidArgumentError: If the numbers do not fit each other.
        NonFiniteError: If a product is not finite.

    References:
        Golub & Van Loan 2013, section 10.1 (residual estimate: 10.1.4).
    """
    _check("k", k, 1, dimension)
    _check("max_steps", max_steps, k, None)
    start = np.random.default_rng(seed).normal(size=dimension)
    krylov = _Krylov(matvec, start, min(max_steps, dimension))
    converged = False
    while krylov.size < min(max_steps, dimension) and not krylov.complete and not converged:
        krylov.extend()
        theta, vectors = krylov.ritz()
        residuals = krylov.off_diagonal[-1] * np.abs(vectors[-1, -k:])
        converged = krylov.complete or (
            krylov.size >= k and residuals.max() <= tolerance * np.abs(theta[-k:]).max()
        )
    order = np.arange(theta.size)[::-1][:k]
    return RitzPairs(
        eigenvalues=theta[order],
        eigenvectors=vectors[:, order].T @ krylov.basis,
        residuals=np.zeros(order.size) if krylov.complete else residuals[::-1],
        steps=krylov.size,
        converged=converged,
    )


def spectral_density(
    matvec: MatVec, dimension: int, *, steps: int = 80, probes: int = 4, seed: int = 0
) -> SpectralDensity:
    """Estimates the distribution of all eigenvalues by stochastic Lanczos quadrature.

    For a random unit vector v, ``v^T f(M) v`` has mean ``tr f(M) / n``, and Lanczos from v gives
    its Gauss quadrature: nodes theta_i with weights ``S_{1i}^2``, exact for polynomials of degree
    2 m - 1. Probes are averaged.

    Args:
        matvec: The product ``v -> M v`` on float64 vectors of shape (n,).
        dimension: n.
        steps: Lanczos steps per probe (m); at most n are used.
        probes: Number of random start vectors.
        seed: Seed of the start vectors.

    Returns:
        The `SpectralDensity`.

    Raises:
        InvalidArgumentError: If a number is not positive.
        NonFiniteError: If a product is not finite.

    References:
        Ubaru, Chen & Saad 2017, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature",
        algorithm 1; Ghorbani, Krishnan & Xiao 2019 (neural networks).
    """
    _check("dimension", dimension, 1, None)
    _check("steps", steps, 1, None)
    _check("probes", probes, 1, None)
    generator = np.random.default_rng(seed)
    nodes, weights = [], []
    for _ in range(probes):
        krylov = _Krylov(matvec, generator.normal(size=dimension), min(steps, dimension))
        while krylov.size < min(steps, dimension) and not krylov.complete:
            krylov.extend()
        theta, vectors = krylov.ritz()
        nodes.append(theta)
        weights.append(vectors[0] ** 2 / probes)
    order = np.argsort(np.concatenate(nodes))
    return SpectralDensity(np.concatenate(nodes)[order], np.concatenate(weights)[order])


def _check(name: str, value: int, least: int, most: int | None) -> None:
    if not isinstance(value, Integral) or value < least or (most is not None and value > most):
        limits = f"at least {least}" + ("" if most is None else f" and at most {most}")
        raise InvalidArgumentError(
            f"{name} must be an integer, {limits}. Received: {name}={value!r}"
        )
