r"""Step size and momentum from the exact quadratic model of the loss.

=========  ================================================================  ===========
symbol     meaning                                                           shape
=========  ================================================================  ===========
`p`        preconditioned gradient                                           parameters
`m`        previous step, `w <- w - m`                                       parameters
`c`        coefficients (alpha, mu) of the step `alpha p + mu m`             (2,)
`K`        `[p, m]^T (F + d I) [p, m]`, F the Gauss-Newton matrix            (2, 2)
`b`        `[p, m]^T grad L`                                                 (2,)
=========  ================================================================  ===========

The step changes the model of the loss by `-b^T c + 1/2 c^T K c`, least at `c = K^-1 b`.

References:
    Martens & Grosse 2015, section 7 (momentum) and 6.4 (re-scaling).
"""

from __future__ import annotations

from typing import Any

from keras import ops

__all__ = ["best_coefficients", "model_change"]

_SINGULAR = 1e-6  # relative determinant below which both directions count as one


def best_coefficients(k: Any, b: Any) -> Any:
    """Minimizes the quadratic model over the span of gradient step and previous step.

    Args:
        k: K, shape (2, 2), positive semi-definite up to rounding; (1, 1) without momentum.
        b: b, shape (2,) or (1,).

    Returns:
        c, shaped like b: the momentum is zero where the two directions are as good as parallel or
        there is no previous step, all is zero where the model is not finite or not convex.
    """
    kpp = k[0, 0]
    curved = ops.where(kpp > 0, kpp, ops.ones_like(kpp))
    alone = ops.where(kpp > 0, b[0] / curved, ops.zeros_like(kpp))
    c = ops.stack([alone])
    if b.shape[0] == 2:
        kpm, kmm = 0.5 * (k[0, 1] + k[1, 0]), k[1, 1]
        determinant = kpp * kmm - kpm * kpm
        is_plane = determinant > _SINGULAR * kpp * kmm
        safe = ops.where(is_plane, determinant, ops.ones_like(determinant))
        both = ops.stack([kmm * b[0] - kpm * b[1], kpp * b[1] - kpm * b[0]]) / safe
        c = ops.where(is_plane, both, ops.stack([alone, ops.zeros_like(alone)]))
    return ops.where(ops.all(ops.isfinite(c)), c, ops.zeros_like(c))


def model_change(k: Any, b: Any, c: Any) -> Any:
    """Predicted change of the loss for coefficients c: `-b^T c + 1/2 c^T K c`, a scalar."""
    return 0.5 * ops.sum(c * ops.matmul(k, c[:, None])[:, 0]) - ops.sum(b * c)
