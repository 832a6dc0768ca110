"""Channel rules for sequence layers: embeddings, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Extent
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import register_channel_rule

__all__: list[str] = []


@register_channel_rule(layers.Embedding)
class EmbeddingRule(ContractionRule):
    """`Embedding` creates channels out of indices; looking them up costs no multiplications."""

    weights: ClassVar = {"embeddings": (None, "out")}
    sizes: ClassVar = {"output_dim": "out"}

    def out_size(self, layer: Any) -> int:
        return layer.output_dim

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer = call.operation
        if not self.has_plain_weights(layer):
            return self.freeze_all(call, flow, reasons.WEIGHTS_NOT_PLAIN)
        return [[*flow.of(call.inputs[0]), flow.created(call, "out", layer.output_dim)]]

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        return []


@register_channel_rule(layers.RepeatVector)
class RepeatVectorRule(ChannelRule):
    """`RepeatVector` adds a time axis before the channels."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        batch, channels = flow.of(call.inputs[0])
        return [[batch, None, channels]]

    def is_homogeneous(self, call: Call) -> bool:
        return True
