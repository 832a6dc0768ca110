"""What a budget asked for, what the network has come to, and why the two differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from keras import ops

from tf_kfacprune.gates import GatedNetwork, GatePhase
from tf_kfacprune.pruning.budget import Budget
from tf_kfacprune.pruning.channel_counts import GateGroups

__all__ = ["BudgetOutcome", "budget_outcomes"]


@dataclass(frozen=True)
class BudgetOutcome:
    """One bound of a budget and what became of it.

    Attributes:
        asked: The bound, in the unit in which the budget has it.
        achieved: The cost of the network, in the same unit.
        reason: Why the two differ, or None if they do not.
    """

    asked: float
    achieved: float
    reason: str | None = None

    @property
    def ratio(self) -> float:
        """Achieved over asked; at most 1 once the network has landed."""
        return self.achieved / self.asked

    def __str__(self) -> str:
        because = f": {self.reason}" if self.reason else ""
        return f"asked {self.asked:.6g}, achieved {self.achieved:.6g}{because}"


@dataclass(frozen=True)
class _Reopening:
    """Gates that could open next, and the costs that would follow, relative to the budget."""

    name: str
    loads: dict[str, float]


def budget_outcomes(
    budget: Budget, gated: GatedNetwork, groups: GateGroups
) -> dict[str, BudgetOutcome]:
    """Compares a network, as its gates are now, with its budget.

    Args:
        budget: The budget.
        gated: The gated network.
        groups: How many gates of each group may stay open.

    Returns:
        An outcome for every bound, by measure.
    """
    is_open = gated.gate_values() > 0
    targets = budget.relative_to(gated.cost).targets
    loads = _loads(is_open, gated, targets)
    settled = int(ops.convert_to_numpy(gated.sources[0].phase)) == GatePhase.SETTLED
    cheapest = None
    if settled and not is_open.all():
        candidates = _reopenings(is_open, gated, groups, targets)
        cheapest = min(candidates, key=lambda c: max(c.loads.values()), default=None)
    outcomes = {}
    for measure, asked in budget.targets.items():
        unit = budget.unit(measure, gated.cost)
        achieved = targets[measure] * loads[measure] * unit
        reason = None
        if achieved != asked:
            reason = _reason(measure, budget, gated, targets, loads, cheapest, settled)
        outcomes[measure] = BudgetOutcome(asked, achieved, reason)
    return outcomes


def _reason(
    measure: str,
    budget: Budget,
    gated: GatedNetwork,
    targets: dict[str, float],
    loads: dict[str, float],
    cheapest: _Reopening | None,
    settled: bool,
) -> str:
    if budget.relative_to(gated.cost).is_open:
        return "the dense network is within the budget"
    if not settled:
        return "the gates have not settled yet"
    if cheapest is None:
        return "there is nothing left that may reopen"
    over = max(cheapest.loads, key=lambda m: cheapest.loads[m])
    if cheapest.loads[over] <= 1.0:
        return f"the gates were not set by the budget: {cheapest.name} could reopen"
    value = cheapest.loads[over] * targets[over] * budget.unit(over, gated.cost)
    text = (
        f"the cheapest that could reopen, {cheapest.name}, would make {over}={value:.6g} of "
        f"{budget.targets[over]:.6g}"
    )
    return text if over == measure or loads[over] <= loads[measure] else f"{over} decides: {text}"


def _loads(is_open: np.ndarray, gated: GatedNetwork, targets: dict[str, float]) -> dict[str, float]:
    """Cost over bound, by measure."""
    openness = ops.convert_to_numpy(
        gated.openness(ops.convert_to_tensor(is_open.astype("float32")))
    )
    cost = gated.cost
    return {m: cost.exact(m, openness) / (cost.dense(m) * t) for m, t in targets.items()}


def _reopenings(
    is_open: np.ndarray, gated: GatedNetwork, groups: GateGroups, targets: dict[str, float]
) -> Iterator[_Reopening]:
    """For each group the next gates that may open together."""
    names = [group.name for group in gated.channels.groups]
    for number, counts in enumerate(groups.counts):
        closed = np.flatnonzero((groups.of_gate == number) & ~is_open)
        if counts.size - len(closed) + counts.step > counts.most or not len(closed):
            continue
        trial = is_open.copy()
        trial[closed[: counts.step]] = True
        what = "1 neuron" if counts.step == 1 else f"{counts.step} neurons"
        where = f" of {names[number]}" if number < len(names) else ""
        yield _Reopening(f"{what}{where}", _loads(trial, gated, targets))
