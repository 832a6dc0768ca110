"""Kronecker-factored matrices ``A (x) G`` in the layout of Keras kernels.

====== ============================================================= ===============
symbol meaning                                                       shape
====== ============================================================= ===============
A      second moment of a layer's inputs (homogeneous coordinate      (n_in, n_in)
       included where the layer has a bias)
G      second moment of the gradients at its pre-activations          (n_out, n_out)
V      kernel (with the bias as its last row), or its gradient        (n_in, n_out)
d      Tikhonov damping of the product                                scalar
====== ============================================================= ===============

Keras keeps V = W^T. Stacking the rows of V equals stacking the columns of W, so the papers'
identity ``(A (x) G) vec(W) = vec(G W A^T)`` reads here, with vec stacking rows,

    (A (x) G) vec(V) = vec(A V G^T).
"""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["factored_damping"]


def factored_damping(mean_left: Any, mean_right: Any, damping: Any) -> tuple[Any, Any]:
    """Splits the damping of ``A (x) G`` between its factors.

        (A + pi sqrt(d) I) (x) (G + sqrt(d)/pi I),   pi = sqrt((tr A / n_in) / (tr G / n_out))

    approximates ``A (x) G + d I``; this pi balances the two cross terms, so that a layer whose
    inputs are large and gradients small is damped evenly on both sides.

    Args:
        mean_left: Mean eigenvalue of A, ``tr A / n_in``; of any shape.
        mean_right: Mean eigenvalue of G, ``tr G / n_out``; of the same shape.
        damping: d, non-negative scalar.

    Returns:
        ``(pi sqrt(d), sqrt(d) / pi)``, of the shape of the means. Where a factor has no positive
        finite trace pi is undefined and taken as 1.

    References:
        Martens & Grosse 2015, section 6.3.
    """
    ops = keras.ops
    ratio = mean_left / ops.where(mean_right > 0, mean_right, ops.ones_like(mean_right))
    defined = ops.logical_and(mean_right > 0, ops.logical_and(ratio > 0, ops.isfinite(ratio)))
    pi = ops.sqrt(ops.where(defined, ratio, ops.ones_like(ratio)))
    root = ops.sqrt(ops.convert_to_tensor(damping, dtype=pi.dtype))
    return pi * root, root / pi
