"""Bounds on the length of steps; pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

__all__ = ["clipped", "constrained", "dot"]

_TINY = 1e-20


def clipped(
    steps: Sequence[Any], gradients: Sequence[Any], members: Sequence[int], eta: Any, kappa: Any
) -> list[Any]:
    """Steps whose squared norm in the metric of the curvature is at most kappa.

    Args:
        steps: P, one per variable of the optimizer.
        gradients: dW, likewise, or None.
        members: Places of the variables in Kronecker blocks.
        eta: Learning rate, scalar.
        kappa: KL clip, scalar.

    References:
        Ba, Grosse, Martens 2017, section 5.
    """
    known = [i for i in members if gradients[i] is not None]
    if not known:
        return list(steps)
    change = dot([steps[i] for i in known], [gradients[i] for i in known])
    nu = tf.minimum(1.0, tf.sqrt(kappa / (tf.square(eta) * change + _TINY)))
    return _scaled(steps, known, nu)


def constrained(
    steps: Sequence[Any],
    gradients: Sequence[Any],
    blocks: Iterable[Sequence[int]],
    eta: Any,
    bound: Any,
) -> list[Any]:
    """Steps whose norm in each block is at most a bound.

    Args:
        steps: As of `clipped`.
        gradients: As of `clipped`.
        blocks: Places of the variables of each Kronecker block.
        eta: Learning rate, scalar.
        bound: The bound, scalar.
    """
    found = list(steps)
    for indices in blocks:
        members = [i for i in indices if gradients[i] is not None]
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
