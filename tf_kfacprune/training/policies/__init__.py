"""Closing policies: what happens to the gates in a step of the prune phase."""

from tf_kfacprune.training.policies.base import PolicyState
from tf_kfacprune.training.policies.choice import (
    check_kind_of_gates,
    chosen_policy,
    policy_state,
)

__all__ = ["PolicyState", "check_kind_of_gates", "chosen_policy", "policy_state"]
