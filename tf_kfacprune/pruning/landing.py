"""Which gates stay open so that the network lands on its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

__all__ = ["OpenCounts", "land_on_budget"]


@dataclass(frozen=True)
class OpenCounts:
    """How many gates of a group may be open: `least`, `least + step`, ... up to `most`.

    Attributes:
        size: Number of gates in the group.
        least: The smallest number allowed, in [0, size].
        step: Distance between the numbers allowed, at least 1.
    """

    size: int
    least: int = 1
    step: int = 1

    @property
    def most(self) -> int:
        """The largest number allowed."""
        return self.least + (self.size - self.least) // self.step * self.step


class _Blocks:
    """Gates sorted by group and score, cut into blocks that close one after another.

    The first `least` gates of a group are never closed, those past `most` always; between them
    lie blocks of `step` gates.

    Attributes:
        protected: For each slot (place in the sorted order) whether its gate stays open.
        of_slot: The number of each slot's block; `count` where it is in none.
        step: Number of gates of each block.
        count: Number of blocks.
    """

    def __init__(self, counts: Sequence[OpenCounts]) -> None:
        protected: list[np.ndarray] = []
        of_slot: list[np.ndarray] = []
        steps: list[int] = []
        for group in counts:
            place = np.arange(group.size)
            block = len(steps) + (place - group.least) // group.step
            is_free = (place >= group.least) & (place < group.most)
            protected.append(place < group.least)
            of_slot.append(np.where(is_free, block, -1))
            steps += [group.step] * ((group.most - group.least) // group.step)
        self.count = len(steps)
        self.step = np.array([*steps, 1], "float32")
        self.protected = np.concatenate(protected)
        slots = np.concatenate(of_slot)
        self.of_slot = np.where(slots < 0, self.count, slots).astype("int32")


def land_on_budget(
    scores: Any,
    groups: np.ndarray,
    counts: Sequence[OpenCounts],
    fraction: Callable[[str, Any], Any],
    targets: Mapping[str, float],
) -> Any:
    """Keeps the highest scores: as many as fit into the budget, in numbers that are allowed.

    Blocks of gates (single ones, unless channel counts are rounded) close one after another, the
    lowest mean rank of scores first. That only ever lowers the cost, so bisection finds the last
    network above the budget and hence the first within it: it undershoots by less than one block.
    Runs inside a `tf.function`.

    Args:
        scores: How much each gate deserves to stay open, shape `(n,)`.
        groups: The group of each gate, integers of shape `(n,)`.
        counts: What each group allows, in the order of their numbers.
        fraction: `(measure, keep) -> scalar`, the cost of the network with the gates in `keep`.
        targets: Largest allowed fraction by measure.

    Returns:
        Float tensor of shape `(n,)`: 1 for gates that stay open, 0 for those that close.
    """
    n, blocks = len(groups), _Blocks(counts)
    rank = ops.argsort(ops.argsort(scores))
    best_first = ops.cast(groups * n, "int64") + ops.cast(n - 1 - rank, "int64")
    gate_at_slot = ops.argsort(best_first)
    slot_of_gate = ops.argsort(gate_at_slot)
    ranks = ops.cast(ops.take(rank, gate_at_slot), "float32")
    total = ops.segment_sum(ranks, blocks.of_slot, num_segments=blocks.count + 1)
    order = ops.argsort(ops.argsort((total / blocks.step)[: blocks.count]))
    # Slots in no block close at once, unless they are protected.
    order = ops.append(order, ops.convert_to_tensor([-1], dtype=order.dtype))
    closes_as = ops.take(order, blocks.of_slot)

    def keep_after(closings: Any) -> Any:
        at_slot = ops.logical_or(closes_as >= closings, blocks.protected)
        return ops.cast(ops.take(at_slot, slot_of_gate), "float32")

    def fits(closings: Any) -> Any:
        keep = keep_after(closings)
        return ops.all(ops.stack([fraction(m, keep) <= t for m, t in targets.items()]))

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = (low + high) // 2
        enough = fits(middle)
        return ops.where(enough, low, middle + 1), ops.where(enough, middle, high)

    start = (ops.convert_to_tensor(0, "int32"), ops.convert_to_tensor(blocks.count, "int32"))
    steps = math.ceil(math.log2(blocks.count + 1)) + 1
    low, _ = ops.fori_loop(0, steps, halve, start)
    return keep_after(low)
