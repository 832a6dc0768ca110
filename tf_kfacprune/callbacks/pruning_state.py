"""What callbacks and reports read of a `PrunableModel`: the one place that knows where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from tf_kfacprune.gates import GatePhase
from tf_kfacprune.pruning import BudgetOutcome

__all__ = ["GroupState", "PruningState", "phase_boundaries", "pruning_state", "settings_of"]


@dataclass(frozen=True)
class GroupState:
    """One group of coupled neurons, as it is now.

    Attributes:
        name: Name of the group.
        size: Number of its neurons.
        kept: How many of them would be left if the network were compacted now.
        scores: How much each neuron deserves to stay, shape (size,); None without a budget. What
            is not finite is left out.
    """

    name: str
    size: int
    kept: int
    scores: NDArray[np.float32] | None


@dataclass(frozen=True)
class PruningState:
    """A network in the middle of its pruning, or after it.

    Attributes:
        phase: `"warm-up"`, `"prune"` or `"settle"`.
        groups: Its groups of neurons, in the order of the model.
        costs: `"macs"` and `"params"` -> count of the network as it is now.
        dense: The same of the network with all neurons.
        outcomes: Measure -> what the budget asked for and what the network has come to.
    """

    phase: str
    groups: tuple[GroupState, ...]
    costs: dict[str, int]
    dense: dict[str, int]
    outcomes: Mapping[str, BudgetOutcome] = field(default_factory=dict)


_PHASES = {
    GatePhase.HELD_OPEN: "warm-up",
    GatePhase.PRUNING: "prune",
    GatePhase.SETTLED: "settle",
}


def pruning_state(model: Any) -> PruningState | None:
    """Reads a model.

    Args:
        model: A `PrunableModel`.

    Returns:
        Its state, or None if it has no gates.
    """
    gated = model.gated
    if gated is None:
        return None
    kept = gated.kept_neurons()
    scores = _scores_of_neurons(model)
    groups = []
    for group in gated.channels.groups:
        members = slice(group.start, group.start + group.size)
        of_group = None if scores is None else scores[members]
        if of_group is not None:
            of_group = of_group[np.isfinite(of_group)]
        groups.append(GroupState(group.name, group.size, int(kept[members].sum()), of_group))
    openness = kept.astype("float64")
    return PruningState(
        phase=_PHASES[GatePhase(int(ops.convert_to_numpy(gated.sources[0].phase)))],
        groups=tuple(groups),
        costs={m: gated.cost.count(m, openness) for m in ("macs", "params")},
        dense={m: int(gated.cost.dense(m)) for m in ("macs", "params")},
        outcomes=model.budget_outcomes(),
    )


def _scores_of_neurons(model: Any) -> NDArray[np.float32] | None:
    """Scores per neuron; one with several gates has that of its best."""
    if model.controller is None:
        return None
    scores = ops.convert_to_numpy(model.controller.policy.scores())
    return scores[model.gated.neuron_gates].max(axis=1)


def phase_boundaries(model: Any, total_steps: int) -> tuple[int, int] | None:
    """Steps at which pruning starts and ends in a run of so many; None if nothing is pruned."""
    if model.budget is None or model.budget.is_open:
        return None
    return model.phases.boundaries(total_steps)


def settings_of(model: Any) -> dict[str, str]:
    """How a model is trained, in words that can be typed again: setting -> value.

    Args:
        model: A `PrunableModel`, or a gated model built by hand, of which nothing is known.
    """
    found: dict[str, str] = {}
    for name in ("budget", "curvature", "policy", "phases", "round_to", "min_channels", "seed"):
        value = getattr(model, name, None)
        if value is not None:
            found[name] = repr(value)
    if (targets := getattr(getattr(model, "budget", None), "targets", None)) is not None:
        found["budget"] = f"Budget({', '.join(f'{m}={t!r}' for m, t in targets.items())})"
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        found["optimizer"] = type(optimizer).__name__
        decay = optimizer.get_config().get("weight_decay")
        if decay is not None:
            found["optimizer"] += f", weight decay {decay:g}"
    return found
