"""What to prune, how far, when and by which policy."""

from tf_kfacprune.pruning.budget import Budget
from tf_kfacprune.pruning.channel_counts import GateGroups
from tf_kfacprune.pruning.controller import PruningController
from tf_kfacprune.pruning.landing import OpenCounts, land_on_budget
from tf_kfacprune.pruning.outcome import BudgetOutcome, budget_outcomes
from tf_kfacprune.pruning.phases import Phases, target_fraction
from tf_kfacprune.pruning.policies import (
    POLICIES,
    HardConcreteGates,
    KFACSaliency,
    MagnitudeSaliency,
    Policy,
    ProximalGates,
    RandomSaliency,
    ScheduledClosing,
    TaylorSaliency,
    policy_for,
)
from tf_kfacprune.pruning.task import PruningTask

__all__ = [
    "POLICIES",
    "Budget",
    "BudgetOutcome",
    "GateGroups",
    "HardConcreteGates",
    "KFACSaliency",
    "MagnitudeSaliency",
    "OpenCounts",
    "Phases",
    "Policy",
    "ProximalGates",
    "PruningController",
    "PruningTask",
    "RandomSaliency",
    "ScheduledClosing",
    "TaylorSaliency",
    "budget_outcomes",
    "land_on_budget",
    "policy_for",
    "target_fraction",
]
