"""Channel rule for the weights of opened layers that are nodes of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Count, Roles, Shape
from tf_kfacprune.graph.rules.registry import register_channel_rule
from tf_kfacprune.graph.weight_layer import Weight

__all__: list[str] = []


@register_channel_rule(Weight)
class WeightRule(ChannelRule):
    """`Weight`: its entries live and die with the channels that they are combined with."""

    def weight_roles(self, layer: Any) -> Roles:
        return {"weight": [f"axis{k}" for k in range(len(layer.weight_shape))]}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer = call.operation
        sizes = enumerate(layer.weight_shape)
        flow.own_weights[call.outputs[0]] = call
        return [
            [flow.following(layer, f"axis{k}", size) if size > 1 else None for k, size in sizes]
        ]

    def is_homogeneous(self, call: Call) -> bool:
        return True  # it does not read its input

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        config["shape"] = list(shape)
