"""Dominant eigenvector of a symmetric matrix, warm-started and safe inside a training step."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["power_iteration"]


def power_iteration(matrix: Any, vector: Any, steps: int = 1) -> tuple[Any, Any]:
    """Improves a dominant eigenvector by ``u <- M u / |M u|``.

    ====== ============================================ ========
    symbol meaning                                      shape
    ====== ============================================ ========
    M      symmetric positive semi-definite matrix      (n, n)
    u      unit vector, approximate eigenvector         (n,)
    ====== ============================================ ========

    The error shrinks by ``lambda_2 / lambda_1`` per step. A running average changes little from
    one call to the next, so that one step per call, from the last vector, follows it.

    Args:
        matrix: M, tensor of shape (n, n).
        vector: Start u, tensor of shape (n,); need not have unit length.
        steps: Number of multiplications, at least 1.

    Returns:
        ``(u, u^T M u)``: the unit eigenvector, shape (n,), and its Rayleigh quotient, a scalar.
        Where u or M u has no direction (zero, or not finite), u is the uniform vector, and the
        quotient is its own: 0 for M = 0, not finite where M is not.

    References:
        Golub & Van Loan 2013, "Matrix Computations", section 8.2.1.
    """
    ops = keras.ops
    n = matrix.shape[-1]
    uniform = ops.ones((n,), dtype=matrix.dtype) / float(n) ** 0.5
    vector = _unit_or(vector, uniform)
    for _ in range(steps):
        vector = _unit_or(ops.matmul(matrix, vector), uniform)
    return vector, ops.sum(vector * ops.matmul(matrix, vector))


def _unit_or(vector: Any, fallback: Any) -> Any:
    """``vector`` scaled to unit length, or ``fallback`` where it has no direction."""
    ops = keras.ops
    largest = ops.max(ops.abs(vector))  # scaled first, so that squares neither over- nor underflow
    has_direction = ops.logical_and(largest > 0, ops.all(ops.isfinite(vector)))
    scaled = vector / ops.where(has_direction, largest, ops.ones_like(largest))
    scaled = ops.where(has_direction, scaled, fallback)
    return scaled / ops.sqrt(ops.sum(ops.square(scaled)))
