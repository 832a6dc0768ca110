"""From the policy that was asked for to the state that carries it out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork, GateSource
from tf_kfacprune.pruning import ScheduledClosing, gate_kind, named_policy
from tf_kfacprune.training.policies.base import PolicyState
from tf_kfacprune.training.policies.priced import PricedGates
from tf_kfacprune.training.policies.scheduled import ScheduledGates
from tf_kfacprune.training.pruning_plan import PruningPlan

__all__ = ["check_kind_of_gates", "chosen_policy", "policy_state"]


def chosen_policy(policy: Any, sources: Iterable[GateSource]) -> str | ScheduledClosing:
    """The policy that was asked for, names of criteria written out, or the one that fits the gates.

    Args:
        policy: As given to `PrunableModel`.
        sources: Gates that the model has already.

    Raises:
        InvalidArgumentError: If there is no such policy.
    """
    if policy is not None:
        return named_policy(policy)
    stochastic = any(source.kind == "hard_concrete" for source in sources)
    return "hard_concrete" if stochastic else ScheduledClosing()


def policy_state(
    policy: str | ScheduledClosing, plan: PruningPlan, seed: int | None
) -> PolicyState:
    """The state of a policy.

    Args:
        policy: A policy as `named_policy` returns it.
        plan: What is to be pruned and how far.
        seed: Seed of what is random in the policy, or None.
    """
    if isinstance(policy, ScheduledClosing):
        return ScheduledGates(plan, policy, seed, name="policy")
    return PricedGates(plan, name="policy")


def check_kind_of_gates(policy: str | ScheduledClosing, gated: GatedNetwork) -> None:
    """Checks that the gates of a network, which may be built by hand, are of a policy's kind.

    Raises:
        InvalidArgumentError: If they are not.
    """
    wanted = gate_kind(policy)
    for source in gated.sources:
        if source.kind != wanted:
            raise InvalidArgumentError(
                f"Policy {policy!r} of PrunableModel needs gates of kind {wanted!r}. Received: "
                f"gate layer {source.name!r} of kind {source.kind!r}. Build the gates of the model "
                f"with kind {wanted!r}, or pass a policy that fits them: 'hard_concrete' for that "
                "kind, 'proximal' or a ScheduledClosing for 'deterministic'."
            )
