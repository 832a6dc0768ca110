"""Which gates stay open so that the network lands on its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

__all__ = ["group_ids", "land_on_budget"]


def group_ids(group_sizes: Sequence[int]) -> np.ndarray:
    """Number of the group that each gate belongs to, shape `(n,)`, int32."""
    return np.repeat(np.arange(len(group_sizes), dtype="int32"), group_sizes)


def land_on_budget(
    scores: Any,
    group_sizes: Sequence[int],
    fraction: Callable[[str, Any], Any],
    targets: Mapping[str, float],
) -> Any:
    """Keeps the highest scores: as many as fit into the budget, and the best of each group.

    Closing gates one after another, lowest score first, only ever lowers the cost, so bisection
    finds the last network above the budget and hence the first within it: it undershoots by less
    than one gate. Runs inside a `tf.function`.

    Args:
        scores: How much each gate deserves to stay open, shape `(n,)`.
        group_sizes: Sizes of the groups of gates, in order; their sum is n.
        fraction: `(measure, keep) -> scalar`, the cost of the network with the gates in `keep`.
        targets: Largest allowed fraction by measure.

    Returns:
        Float tensor of shape `(n,)`: 1 for gates that stay open, 0 for those that close.
    """
    n = int(sum(group_sizes))
    ids = group_ids(group_sizes)
    order = ops.argsort(scores)
    rank = ops.argsort(order)
    # Ranks are distinct, so exactly one gate of each group holds the largest one.
    best = ops.segment_max(rank, ids, num_segments=len(group_sizes))
    protected = ops.equal(rank, ops.take(best, ids))

    def keep_after(closings: Any) -> Any:
        return ops.cast(ops.logical_or(rank >= closings, protected), "float32")

    def fits(closings: Any) -> Any:
        keep = keep_after(closings)
        return ops.all(ops.stack([fraction(m, keep) <= t for m, t in targets.items()]))

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = (low + high) // 2
        enough = fits(middle)
        return ops.where(enough, low, middle + 1), ops.where(enough, middle, high)

    start = (ops.convert_to_tensor(0, "int32"), ops.convert_to_tensor(n, "int32"))
    steps = math.ceil(math.log2(n + 1)) + 1
    low, _ = ops.fori_loop(0, steps, halve, start)
    return keep_after(low)
