"""Channel rules for sequence layers: embeddings, repetition, masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from keras import layers, ops

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Extent, Gates, Roles, extents
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import existing_layers, register_channel_rule

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


@register_channel_rule(*existing_layers("ReversibleEmbedding"))
class ReversibleEmbeddingRule(EmbeddingRule):
    """`ReversibleEmbedding`: called in reverse it reads the channels that it creates."""

    folded: ClassVar = {}

    def weight_roles(self, layer: Any) -> Roles:
        roles: dict[str, Sequence[str | None]] = {"embeddings": (None, "out")}
        if not layer.tie_weights:
            roles["reverse_embeddings"] = ("out", None)
        return roles

    def is_reverse(self, call: Call) -> bool:
        """Whether a call projects channels back to indices."""
        return bool(call.args[1] if len(call.args) > 1 else call.kwargs.get("reverse", False))

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        value = call.inputs[0]
        return {value: {len(value.shape) - 1}} if self.is_reverse(call) else {}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, value = call.operation, call.inputs[0]
        if not self.is_reverse(call) or not self.has_plain_weights(layer):
            return super().propagate(call, flow)
        created = flow.created(call, "out", layer.output_dim)
        axis = len(value.shape) - 1
        if flow.of(value)[axis] is None:
            flow.freeze(created, reasons.UNTRACKED_OPERAND, call.path)
        else:
            flow.unite(created, flow.read(call, value, axis, "back"), call.path)
        return [[*flow.of(value)[:-1], None]]

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        if not self.is_reverse(call):
            return []
        value = call.inputs[0]
        places = extents(value, flow, range(1, len(value.shape)))
        return [[*places, call.operation.input_dim]]


@register_channel_rule(layers.RepeatVector)
class RepeatVectorRule(ChannelRule):
    """`RepeatVector` adds a time axis before the channels."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        batch, channels = flow.of(call.inputs[0])
        return [[batch, None, channels]]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(layers.Masking)
class MaskingRule(ChannelRule):
    """`Masking`: the channels that stay decide which steps are masked."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, axes = call.operation, flow.of(call.inputs[0])
        if np.ndim(layer.mask_value) == 0 and np.isfinite(layer.mask_value):
            flow.read_inside(call, "channels", flow.role(layer, "channels", axes[-1], call.path))
        else:
            flow.freeze(axes[-1], reasons.REDUCED, call.path)
        return [axes]

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        present = gates["channels"].present > 0
        # With the value of a masked step, a closed channel does not speak against masking.
        return layer(ops.where(present, args[0], ops.cast(layer.mask_value, args[0].dtype)))
