"""Short names of closing policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GateSource
from tf_kfacprune.pruning.policies.base import Policy
from tf_kfacprune.pruning.policies.priced import HardConcreteGates, ProximalGates
from tf_kfacprune.pruning.policies.saliency import (
    KFACSaliency,
    MagnitudeSaliency,
    RandomSaliency,
    TaylorSaliency,
)
from tf_kfacprune.pruning.policies.scheduled import ScheduledPolicy
from tf_kfacprune.validation import require

__all__ = ["POLICIES", "ScheduledClosing", "policy_for"]

_SALIENCIES: dict[str, type[ScheduledPolicy]] = {
    "kfac": KFACSaliency,
    "taylor": TaylorSaliency,
    "magnitude": MagnitudeSaliency,
    "random": RandomSaliency,
}
POLICIES: dict[str, type[Policy]] = {
    "hard_concrete": HardConcreteGates,
    "proximal": ProximalGates,
    **_SALIENCIES,
}


def ScheduledClosing(criterion: str = "kfac", every: int = 20) -> ScheduledPolicy:
    """A policy that opens and closes gates at set times, by the name of its saliency.

    Args:
        criterion: `"kfac"` (`KFACSaliency`), `"taylor"`, `"magnitude"` or `"random"`.
        every: Steps from one selection to the next.

    Returns:
        The policy of that name.

    Raises:
        InvalidArgumentError: If an argument has the wrong type or value.

    Examples:
        >>> policy = kp.ScheduledClosing("taylor", every=20)
    """
    known = isinstance(criterion, str) and criterion in _SALIENCIES
    names = tuple(_SALIENCIES)
    require("ScheduledClosing", known, "criterion", f"one of {names}", criterion)
    return _SALIENCIES[criterion](every=every)


def policy_for(policy: Any, sources: Sequence[GateSource]) -> Policy:
    """The policy that was asked for, or the one that fits the gates a model has already.

    Args:
        policy: A policy, its name, or None.
        sources: Gates of the model, if it was built with gates.

    Raises:
        InvalidArgumentError: If there is no such policy, or the gates are of another kind.
    """
    if policy is None:
        stochastic = any(source.kind == "hard_concrete" for source in sources)
        policy = "hard_concrete" if stochastic else "kfac"
    if isinstance(policy, str) and policy in POLICIES:
        policy = POLICIES[policy]()
    expected = f"one of {tuple(POLICIES)}, or a policy such as KFACSaliency(...)"
    require("PrunableModel", isinstance(policy, Policy), "policy", expected, policy)
    for source in sources:
        if source.kind != policy.gate_kind:
            raise InvalidArgumentError(
                f"Policy {policy!r} of PrunableModel needs gates of kind {policy.gate_kind!r}. "
                f"Received: gate layer {source.name!r} of kind {source.kind!r}. Build the gates of "
                f"the model with kind {policy.gate_kind!r}, or pass a policy that fits them: "
                "'hard_concrete' for that kind, 'proximal' or a saliency such as 'kfac' for "
                "'deterministic'."
            )
    return policy
