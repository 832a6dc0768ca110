"""Closing policies: how gates find out whether to close."""

from tf_kfacprune.pruning.policies.base import Policy, PolicyState
from tf_kfacprune.pruning.policies.named import POLICIES, ScheduledClosing, policy_for
from tf_kfacprune.pruning.policies.priced import HardConcreteGates, ProximalGates
from tf_kfacprune.pruning.policies.saliency import (
    KFACSaliency,
    MagnitudeSaliency,
    RandomSaliency,
    TaylorSaliency,
)

__all__ = [
    "POLICIES",
    "HardConcreteGates",
    "KFACSaliency",
    "MagnitudeSaliency",
    "Policy",
    "PolicyState",
    "ProximalGates",
    "RandomSaliency",
    "ScheduledClosing",
    "TaylorSaliency",
    "policy_for",
]
