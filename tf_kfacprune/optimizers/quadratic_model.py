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

Where gradients are clipped, b is that of the clipped ones, which step and penalty go by; the change
of the loss is predicted with the loss' own.

A penalty that is not in the model of the loss adds its own `[p, m]^T q` to b. Then
`c = K^-1 (b + t [p, m]^T q)` changes the loss by `1/2 t^2 q^T [..] K^-1 [..]^T q - 1/2 b^T K^-1 b`:
what the penalty costs, minus what the gradient of the loss gains.

References:
    Martens & Grosse 2015, section 7 (momentum) and 6.4 (re-scaling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import ops

__all__ = ["QuadraticModel", "best_coefficients", "model_change", "with_bounded_penalty"]

_LARGEST_COST = 0.5
_SINGULAR = 1e-6  # relative determinant below which both directions count as one


@dataclass(frozen=True)
class QuadraticModel:
    """The model of the loss along the directions of a step.

    Attributes:
        k: K.
        b: b, of the loss alone.
        of_penalty: The same of a penalty that is not in the model, or None.
        unclipped: b before gradients were clipped, or None if they were not.
    """

    k: Any
    b: Any
    of_penalty: Any = None
    unclipped: Any = None

    def coefficients(self) -> Any:
        """The best coefficients of a step, shaped like b."""
        if self.of_penalty is None:
            return best_coefficients(self.k, self.b)
        return best_coefficients(self.k, with_bounded_penalty(self.k, self.b, self.of_penalty))

    def change(self, c: Any) -> Any:
        """The change of the loss, without penalty, that coefficients c lead to, a scalar."""
        return model_change(self.k, self.b if self.unclipped is None else self.unclipped, c)


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


def with_bounded_penalty(k: Any, b: Any, of_penalty: Any) -> Any:
    """`b + t of_penalty` with the largest t <= 1 that costs half of what the loss would gain.

    What is left is still a fall of the loss by which a step can be judged.

    Args:
        k: K, as for `best_coefficients`.
        b: b, of the loss alone.
        of_penalty: The same of the penalty, shaped like b.

    Returns:
        The right-hand side for `best_coefficients`, shaped like b.
    """
    most = _LARGEST_COST * ops.sum(b * best_coefficients(k, b))
    cost = ops.sum(of_penalty * best_coefficients(k, of_penalty))
    is_dear = cost > most
    square = ops.maximum(most, 0.0) / ops.where(is_dear, cost, ops.ones_like(cost))
    return b + ops.where(is_dear, ops.sqrt(square), ops.ones_like(square)) * of_penalty


def model_change(k: Any, b: Any, c: Any) -> Any:
    """Predicted change of the loss for coefficients c: `-b^T c + 1/2 c^T K c`, a scalar."""
    return 0.5 * ops.sum(c * ops.matmul(k, c[:, None])[:, 0]) - ops.sum(b * c)
