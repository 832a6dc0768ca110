"""Which gates stay open so that the network lands on its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

__all__ = ["TOLERANCE", "OpenCounts", "land_on_budget"]

# A network within this share below its budget has arrived.
TOLERANCE = 0.05

Load = Callable[[Any], Any]


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
    """Gates sorted by group and score, cut into blocks that open one after another.

    The first `least` gates of a group are never closed, those past `most` always; between them
    lie blocks of `step` gates.

    Attributes:
        protected: For each slot (place in the sorted order) whether its gate stays open.
        of_slot: The number of each slot's block; `count` where it is in none.
        step: Number of gates of each block.
        group: The group of each block.
        count: Number of blocks.
        groups: Number of groups.
    """

    def __init__(self, counts: Sequence[OpenCounts]) -> None:
        protected: list[np.ndarray] = []
        of_slot: list[np.ndarray] = []
        steps: list[int] = []
        groups: list[int] = []
        for number, group in enumerate(counts):
            place = np.arange(group.size)
            block = len(steps) + (place - group.least) // group.step
            is_free = (place >= group.least) & (place < group.most)
            protected.append(place < group.least)
            of_slot.append(np.where(is_free, block, -1))
            steps += [group.step] * ((group.most - group.least) // group.step)
            groups += [number] * (len(steps) - len(groups))
        self.count = len(steps)
        self.groups = len(counts)
        self.step = np.array([*steps, 1], "float32")
        self.group = np.array(groups, "int32")
        self.protected = np.concatenate(protected)
        slots = np.concatenate(of_slot)
        self.of_slot = np.where(slots < 0, self.count, slots).astype("int32")


def land_on_budget(
    scores: Any,
    groups: np.ndarray,
    counts: Sequence[OpenCounts],
    fraction: Callable[[str, Any], Any],
    targets: Mapping[str, Any],
    *,
    fill: bool = True,
) -> Any:
    """Keeps the highest scores: as many as fit into the budget, in numbers that are allowed.

    Blocks of gates (single ones, unless channel counts are rounded) open one after another, the
    highest mean rank of scores first, until one does not fit. From then on its group stays as it
    is, and the others go on, until nothing fits any more. A network that is still more than 5 %
    below the budget exchanges blocks of one group for those of others if that brings it closer.

    Opening gates only ever raises the cost, so that what does not fit once will not fit later, and
    bisection finds it: at most one bisection per group. Runs inside a `tf.function`. (A latency may
    fall a little where channels become aligned. It is obeyed all the same: bisection ends at a
    place that was tried and fits.)

    Args:
        scores: How much each gate deserves to stay open, shape `(n,)`.
        groups: The group of each gate, integers of shape `(n,)`.
        counts: What each group allows, in the order of their numbers.
        fraction: `(measure, keep) -> scalar`, the cost of the network with the gates in `keep`.
        targets: Largest allowed fraction by measure.
        fill: Whether to go on behind the first block that does not fit. Without it the networks of
            smaller budgets are parts of those of larger ones, and the search takes less time.

    Returns:
        Float tensor of shape `(n,)`: 1 for gates that stay open, 0 for those that close.
    """
    landing = _Landing(scores, groups, counts)

    def load(is_open: Any) -> Any:
        keep = landing.gates(is_open)
        shares = []
        for measure, target in targets.items():
            share = fraction(measure, keep)
            shares.append(share / ops.convert_to_tensor(target, share.dtype))
        return ops.max(ops.stack(shares))

    is_open = ops.zeros((landing.blocks.count,), "bool")
    stopped = ops.zeros((landing.blocks.groups,), "bool")
    if not landing.blocks.count:
        return landing.gates(is_open)
    if not fill:
        return landing.gates(landing.opened_until_misfit(is_open, stopped, load)[0])
    return landing.gates(landing.exchanged(landing.filled(is_open, stopped, load), load))


class _Landing:
    """The search for a set of open blocks.

    Attributes:
        blocks: The blocks.
        order: The place of each block in the order of opening, the last one first: 0 opens last.
    """

    def __init__(self, scores: Any, groups: np.ndarray, counts: Sequence[OpenCounts]) -> None:
        n, blocks = len(groups), _Blocks(counts)
        rank = ops.argsort(ops.argsort(scores))
        best_first = ops.cast(groups * n, "int64") + ops.cast(n - 1 - rank, "int64")
        gate_at_slot = ops.argsort(best_first)
        self._slot_of_gate = ops.argsort(gate_at_slot)
        ranks = ops.cast(ops.take(rank, gate_at_slot), "float32")
        total = ops.segment_sum(ranks, blocks.of_slot, num_segments=blocks.count + 1)
        self._block_at = ops.argsort((total / blocks.step)[: blocks.count])
        self.order = ops.argsort(self._block_at)
        self.blocks = blocks

    def gates(self, is_open: Any) -> Any:
        """The gates of a set of blocks, with those that are never closed."""
        of_slot = ops.take(ops.append(is_open, ops.zeros((1,), "bool")), self.blocks.of_slot)
        at_slot = ops.logical_or(of_slot, self.blocks.protected)
        return ops.cast(ops.take(at_slot, self._slot_of_gate), "float32")

    def opened_until_misfit(self, is_open: Any, stopped: Any, load: Load) -> tuple[Any, Any]:
        """Opens blocks in order, except of stopped groups, until one does not fit.

        Args:
            is_open: Blocks that are open already, booleans of shape `(blocks,)`.
            stopped: Groups that stay as they are, booleans of shape `(groups,)`.
            load: Cost over budget of a set of open blocks; 1 just fits.

        Returns:
            Open blocks and stopped groups, now with that of the block that did not fit.
        """
        blocks, may_open = self.blocks, self._may_open(is_open, stopped)

        def opened(place: Any) -> Any:
            return ops.logical_or(is_open, ops.logical_and(may_open, self.order >= place))

        place = self._first_that_fits(opened, load)
        misfit = ops.take(self._block_at, ops.maximum(place - 1, 0))
        its_group = ops.equal(np.arange(blocks.groups), ops.take(blocks.group, misfit))
        return opened(place), ops.logical_or(stopped, its_group)

    def filled(self, is_open: Any, stopped: Any, load: Load) -> Any:
        """Opens blocks in order until no group has one that fits; arguments as above."""
        is_open, _ = ops.while_loop(
            lambda is_open, stopped: ops.any(self._may_open(is_open, stopped)),
            lambda is_open, stopped: self.opened_until_misfit(is_open, stopped, load),
            (is_open, stopped),
            maximum_iterations=self.blocks.groups,
        )
        return is_open

    def _may_open(self, is_open: Any, stopped: Any) -> Any:
        goes_on = ops.logical_not(ops.take(stopped, self.blocks.group))
        return ops.logical_and(ops.logical_not(is_open), goes_on)

    def exchanged(self, is_open: Any, load: Load) -> Any:
        """Makes room for better fillings, by one group after the other.

        The group's last block closes and others open instead, or its next block opens and others
        with the lowest scores close instead, whichever comes closer. Does nothing for a network
        that is within `TOLERANCE` of its budget, and goes on only until one is.
        """
        number = np.arange(self.blocks.groups, dtype="int32")

        def too_low(group: Any, is_open: Any) -> Any:
            del group
            some_closed = ops.logical_not(ops.all(is_open))
            return ops.logical_and(some_closed, load(is_open) < 1.0 - TOLERANCE)

        def exchange(group: Any, is_open: Any) -> tuple[Any, Any]:
            best = is_open
            for change in (self._without_last, self._with_next):
                trial = self.filled(change(group, is_open, load), ops.equal(number, group), load)
                share = load(trial)
                better = ops.logical_and(share <= 1.0, share > load(best))
                best = ops.where(better, trial, best)
            return group + 1, best

        start = (ops.convert_to_tensor(0, "int32"), is_open)
        _, is_open = ops.while_loop(too_low, exchange, start, maximum_iterations=self.blocks.groups)
        return is_open

    def _without_last(self, group: Any, is_open: Any, load: Load) -> Any:
        """Closes the last block of a group."""
        del load
        own = ops.logical_and(is_open, ops.equal(self.blocks.group, group))
        last = ops.min(ops.where(own, self.order, self.blocks.count))
        return ops.logical_and(is_open, ops.not_equal(self.order, last))

    def _with_next(self, group: Any, is_open: Any, load: Load) -> Any:
        """Opens the next block of a group and closes those of other groups until it fits."""
        own = ops.equal(self.blocks.group, group)
        closed = ops.logical_and(own, ops.logical_not(is_open))
        following = ops.max(ops.where(closed, self.order, -1))
        more = ops.logical_or(is_open, ops.equal(self.order, following))

        def kept(place: Any) -> Any:
            return ops.logical_and(more, ops.logical_or(own, self.order >= place))

        return kept(self._first_that_fits(kept, load))

    def _first_that_fits(self, is_open_from: Callable[[Any], Any], load: Load) -> Any:
        """The first place at which a set of open blocks that shrinks with it fits, by bisection.

        Past the last place if none does.
        """

        def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = bounds
            middle = (low + high) // 2
            fits = load(is_open_from(middle)) <= 1.0
            return ops.where(fits, low, middle + 1), ops.where(fits, middle, high)

        count = self.blocks.count
        start = (ops.convert_to_tensor(0, "int32"), ops.convert_to_tensor(count, "int32"))
        place, _ = ops.fori_loop(0, math.ceil(math.log2(count + 1)) + 1, halve, start)
        return ops.minimum(place, count)
