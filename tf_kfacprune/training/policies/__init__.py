"""Closing policies: what happens to the gates in a step of the prune phase."""

from tf_kfacprune.training.policies.base import PolicyState
from tf_kfacprune.training.policies.priced import PricedGates
from tf_kfacprune.training.policies.scheduled import ScheduledGates

__all__ = ["PolicyState", "PricedGates", "ScheduledGates"]
