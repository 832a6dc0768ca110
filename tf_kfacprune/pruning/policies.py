"""Closing policies: how gates find out whether to close."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import keras

from tf_kfacprune.validation import require, require_count

__all__ = ["POLICIES", "ScheduledClosing", "gate_kind", "named_policy"]

# Policies that train gates on loss and cost, and the kind of gate they need.
PRICED_POLICIES = {"hard_concrete": "hard_concrete", "proximal": "deterministic"}
CRITERIA = ("kfac", "taylor", "magnitude", "random")
POLICIES = (*PRICED_POLICIES, *CRITERIA)
_SWITCHES = "deterministic"


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class ScheduledClosing:
    """Policy that opens and closes gates at set times, by a criterion.

    At every `every`-th step of the prune phase the network is given the neurons with the highest
    scores, as many as fit into the budget of the moment, which falls along a ramp to the budget
    asked for. Gates are on or off; what is off is scored as well and comes back when its score
    says so. A layer keeps at least one neuron.

    Args:
        criterion: `"kfac"`, the loss that closing the neuron costs by the Kronecker-factored
            curvature; `"taylor"`, by the square of the gradient (Molchanov et al. 2019);
            `"magnitude"`, the norm of the weights that go with the neuron, relative to the mean of
            its group; or `"random"`. The first two, which are losses, are divided by the cost that
            closing the neuron saves.
        every: Number of steps from one selection to the next.

    Raises:
        InvalidArgumentError: If an argument has the wrong type or value.

    Example:
        >>> policy = kp.ScheduledClosing("kfac", every=20)

    References:
        LeCun, Denker, Solla 1989, "Optimal Brain Damage". Molchanov et al. 2019, "Importance
        Estimation for Neural Network Pruning". Zhu & Gupta 2017 (ramp).
    """

    criterion: str = "kfac"
    every: int = 20

    def __post_init__(self) -> None:
        known = self.criterion in CRITERIA
        require("ScheduledClosing", known, "criterion", f"one of {CRITERIA}", self.criterion)
        require_count("ScheduledClosing", "every", self.every)

    @property
    def labels(self) -> str:
        """Whose labels the criterion needs: `"sampled"` from the model, or those of the data."""
        return "sampled" if self.criterion == "kfac" else "data"

    def get_config(self) -> dict[str, Any]:
        """The arguments, for serialization."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ScheduledClosing:
        """Inverse of `get_config`."""
        return cls(**config)


def named_policy(policy: Any) -> str | ScheduledClosing:
    """A policy as given to `PrunableModel`, the names of criteria written out.

    Args:
        policy: The name of a priced policy or of a criterion, or a `ScheduledClosing`.

    Raises:
        InvalidArgumentError: If it is none of these.
    """
    if isinstance(policy, ScheduledClosing):
        return policy
    ok = isinstance(policy, str) and policy in POLICIES
    require("PrunableModel", ok, "policy", f"one of {POLICIES} or a ScheduledClosing", policy)
    return policy if policy in PRICED_POLICIES else ScheduledClosing(policy)


def gate_kind(policy: str | ScheduledClosing) -> str:
    """The kind of gate that a policy needs."""
    return _SWITCHES if isinstance(policy, ScheduledClosing) else PRICED_POLICIES[policy]
