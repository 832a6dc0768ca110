"""What to say when a budget cannot be met, or cannot be counted."""

from __future__ import annotations

from collections.abc import Iterable

from tf_kfacprune.errors import BudgetError
from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.channel_graph import ChannelGraph, Frozen
from tf_kfacprune.graph.cost import CostModel
from tf_kfacprune.graph.opening import OpaqueLayer, opaque_layers

__all__ = ["check_countable", "uncounted_layers", "what_stays"]

_SHOWN = 5  # longer lists are cut
# Measures of which the share of a layer with unknown inside is not known. Weights are counted.
_OF_OPERATIONS = ("macs", "latency")


def what_stays(channels: ChannelGraph, cost: CostModel, measure: str) -> str:
    """What keeps a cost from falling further, for an error message: the largest parts first.

    Input features are left out unless they were meant to be pruned (have gates).

    Args:
        channels: The channel graph of the gated network.
        cost: Its cost.
        measure: A measure of the cost.

    Returns:
        A list of at most five layers with the channels that they keep and the reason, and how many
        more there are; `"none"` if no channel is frozen.
    """
    of = measure if measure in cost.measures else "params"
    shares = {name: costs[of] for name, costs in cost.layer_costs(cost.leaving()).items()}
    inputs = {p.name for p in channels.flow.producers if p.layer is None}
    frozen = [f for f in channels.frozen if f.layer not in inputs or f.reason != reasons.NOT_GATED]
    frozen.sort(key=lambda f: -shares.get(f.layer.split(":")[0], 0.0))
    listed = "; ".join(map(_described, frozen[:_SHOWN])) or "none"
    return listed + (f"; and {len(frozen) - _SHOWN} more" if len(frozen) > _SHOWN else "")


def _described(frozen: Frozen) -> str:
    return f"{frozen.layer} ({frozen.channels}): {frozen.reason}"


def uncounted_layers(channels: ChannelGraph, measure: str) -> list[OpaqueLayer]:
    """Layers whose part of a measure is not known, because their inside is not.

    Args:
        channels: A channel graph.
        measure: A measure of the cost.

    Returns:
        The opaque layers with weights, for a measure of operations; none for any other.
    """
    if measure not in _OF_OPERATIONS:
        return []
    return [opaque for opaque in opaque_layers(channels.graph) if opaque.params]


def check_countable(channels: ChannelGraph, measures: Iterable[str], name: str) -> None:
    """Refuses a budget in what cannot be counted.

    Args:
        channels: The channel graph of the gated network.
        measures: The measures that the budget bounds.
        name: Name of the model.

    Raises:
        BudgetError: If a layer with weights is opaque and a measure of operations is bounded.
    """
    for measure in measures:
        opaque = uncounted_layers(channels, measure)
        if opaque:
            listed = "; ".join(f"{o.path!r}: {o.reason}" for o in opaque[:_SHOWN])
            more = f"; and {len(opaque) - _SHOWN} more" if len(opaque) > _SHOWN else ""
            raise BudgetError(
                f"A budget of {measure} cannot be kept on model {name!r}: what {len(opaque)} of "
                f"its layers cost is not known, because their inside is not seen. {listed}{more}. "
                "Bound the parameters or bytes instead, or give these layers a channel rule with "
                "`macs` (see docs/channels.md)."
            )
