"""Steps of variables in Kronecker blocks: preconditioned gradients, and bounds on their length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_kfacprune.optimizers.kfac_state import Layout

__all__ = ["clipped", "constrained", "dot", "preconditioned"]

_TINY = 1e-20


def preconditioned(layout: Layout, gradients: Sequence[Any], damping: Any) -> list[Any]:
    """Preconditioned gradients P of what is in Kronecker blocks, others as they are.

    Args:
        layout: The Kronecker blocks.
        gradients: One per variable of the optimizer, or None.
        damping: d, scalar.
    """
    found = list(gradients)
    for state in layout.states:
        tensors = [gradients[i] for i in state.indices]
        if any(g is None for g in tensors):
            continue
        matrix = state.block.to_matrix([tf.cast(g, "float32") for g in tensors])
        step = state.precondition(matrix, damping)
        for index, tensor in zip(state.indices, state.block.from_matrix(step), strict=True):
            found[index] = tensor
    return found


def clipped(
    layout: Layout, steps: Sequence[Any], gradients: Sequence[Any], eta: Any, kappa: Any
) -> list[Any]:
    """Steps whose squared norm in the metric of the curvature is at most kappa.

    Args:
        layout: The Kronecker blocks.
        steps: P, one per variable of the optimizer.
        gradients: dW, likewise.
        eta: Learning rate, scalar.
        kappa: KL clip, scalar.

    References:
        Ba, Grosse, Martens 2017, section 5.
    """
    members = [i for i in layout.in_blocks if gradients[i] is not None]
    if not members:
        return list(steps)
    change = dot([steps[i] for i in members], [gradients[i] for i in members])
    nu = tf.minimum(1.0, tf.sqrt(kappa / (tf.square(eta) * change + _TINY)))
    return _scaled(steps, members, nu)


def constrained(
    layout: Layout, steps: Sequence[Any], gradients: Sequence[Any], eta: Any, bound: Any
) -> list[Any]:
    """Steps whose norm in each block is at most a bound; arguments as of `clipped`."""
    found = list(steps)
    for state in layout.states:
        members = [i for i in state.indices if gradients[i] is not None]
        if members:
            own = [found[i] for i in members]
            norm = eta * tf.sqrt(dot(own, own))
            found = _scaled(found, members, tf.minimum(1.0, bound / (norm + _TINY)))
    return found


def _scaled(steps: Sequence[Any], members: Sequence[int], factor: Any) -> list[Any]:
    inside = set(members)
    return [step * factor if i in inside else step for i, step in enumerate(steps)]


def dot(left: Sequence[Any], right: Sequence[Any]) -> Any:
    """Inner product of two lists of tensors, a scalar."""
    return tf.add_n([tf.reduce_sum(a * b) for a, b in zip(left, right, strict=True)])
