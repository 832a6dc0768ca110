"""What to prune, how far and when: budgets, phases, landing."""

from tf_kfacprune.pruning.budget import Budget
from tf_kfacprune.pruning.channel_counts import GateGroups
from tf_kfacprune.pruning.landing import OpenCounts, land_on_budget
from tf_kfacprune.pruning.outcome import BudgetOutcome, budget_outcomes
from tf_kfacprune.pruning.phases import Phases, target_fraction
from tf_kfacprune.pruning.policies import POLICIES, ScheduledClosing, gate_kind, named_policy

__all__ = [
    "POLICIES",
    "Budget",
    "BudgetOutcome",
    "GateGroups",
    "OpenCounts",
    "Phases",
    "ScheduledClosing",
    "budget_outcomes",
    "gate_kind",
    "land_on_budget",
    "named_policy",
    "target_fraction",
]
