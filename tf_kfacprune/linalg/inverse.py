"""Inverse of damped symmetric matrices, by Cholesky with growing jitter; it never yields NaN."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["damped_inverse"]

# The jitter grows tenfold per attempt; the last one exceeds n * max|M|, which makes any finite
# symmetric matrix strictly diagonally dominant (Gershgorin), so that the search cannot fail.
_FIRST_JITTER_EXPONENT = -7
_ATTEMPTS = 10


def damped_inverse(matrix: Any, damping: Any) -> Any:
    """Computes ``(M + damping I)^-1`` of symmetric positive semi-definite matrices.

    ====== ==================================== ========
    symbol meaning                              shape
    ====== ==================================== ========
    M      factors, symmetrized before use      (*k, n, n)
    L      lower Cholesky factors, M = L L^T    (*k, n, n)
    ====== ==================================== ========

    The inverse is ``L^-T L^-1``. Rounding can leave a factor slightly indefinite, and Cholesky
    then fails; the same matrix is tried again with jitter on the diagonal, ten times more at
    each attempt. An attempt counts as failed, too, when the result exceeds the bound
    ``2 / damping``, which no inverse of a semi-definite matrix plus damping can.

    Works eagerly, inside ``tf.function`` and under XLA; one factorization when none fails.

    Args:
        matrix: Tensor of shape (*k, n, n), symmetric up to rounding.
        damping: Non-negative, in the units of ``matrix``: a scalar, or one for each matrix.

    Returns:
        Tensor of shape (*k, n, n), symmetric and finite. It is all zeros where no inverse exists:
        for a matrix (or damping) that is not finite, and for the zero matrix without damping.
        A zero inverse makes an update of zero, which is the safe one.

    References:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", section 6.3.
    """
    ops = keras.ops
    matrix = ops.convert_to_tensor(matrix)
    dtype = matrix.dtype
    damping = ops.convert_to_tensor(damping, dtype=dtype)
    damping = ops.broadcast_to(damping, matrix.shape[:-2])[..., None, None]
    n = matrix.shape[-1]
    identity = ops.eye(n, dtype=dtype)
    damped = 0.5 * (matrix + ops.swapaxes(matrix, -1, -2)) + damping * identity
    usable = _all(ops.isfinite(damped))
    damped = ops.where(usable, damped, identity)
    scale = float(n) * _max(ops.abs(damped))

    def jitter_of(attempt: Any) -> Any:
        power = ops.cast(attempt - 1 + _FIRST_JITTER_EXPONENT, dtype)
        return ops.where(attempt > 0, scale * ops.power(ops.cast(10.0, dtype), power), 0.0)

    def unfinished(attempt: Any, inverse: Any, accepted: Any) -> Any:
        return ops.logical_and(ops.logical_not(ops.all(accepted)), attempt < _ATTEMPTS)

    def attempt_once(attempt: Any, inverse: Any, accepted: Any) -> tuple[Any, Any, Any]:
        found = _inverse_from_cholesky(damped + jitter_of(attempt) * identity)
        inverse = ops.where(accepted, inverse, found)
        accepted = _max(ops.abs(inverse)) * damping <= 2.0  # false for NaN as well
        accepted = ops.logical_and(accepted, _all(ops.isfinite(inverse)))
        return attempt + 1, inverse, accepted

    nothing_accepted = ops.zeros((*matrix.shape[:-2], 1, 1), dtype="bool")
    start = (ops.convert_to_tensor(0, "int32"), ops.zeros_like(damped), nothing_accepted)
    _, inverse, accepted = ops.while_loop(unfinished, attempt_once, start)
    return ops.where(ops.logical_and(usable, accepted), inverse, ops.zeros_like(inverse))


def _all(flags: Any) -> Any:
    return keras.ops.all(flags, axis=(-2, -1), keepdims=True)


def _max(matrix: Any) -> Any:
    return keras.ops.max(matrix, axis=(-2, -1), keepdims=True)


def _inverse_from_cholesky(matrix: Any) -> Any:
    """Inverses of matrices (*k, n, n), NaN where one is not positive definite."""
    factor = _cholesky_or_nan(matrix)
    identity = keras.ops.eye(matrix.shape[-1], dtype=matrix.dtype)
    identity = keras.ops.broadcast_to(identity, matrix.shape)
    inverse_factor = keras.ops.solve_triangular(factor, identity, lower=True)
    return keras.ops.matmul(keras.ops.swapaxes(inverse_factor, -1, -2), inverse_factor)


def _cholesky_or_nan(matrix: Any) -> Any:
    """Lower Cholesky factor, NaN (instead of an exception) on failure.

    ``keras.ops.cholesky`` ends a whole training step with an error on the TensorFlow backend, so
    that nothing could be tried again; TensorFlow's own op reports failure by NaN, as other
    backends do.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.linalg.cholesky(matrix)
    return keras.ops.cholesky(matrix)
