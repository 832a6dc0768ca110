"""Channel rules for sequence layers: embeddings and recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Extent, extents, register_channel_rule
from tf_kfacprune.graph.rules.contractions import ContractionRule

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


class RecurrentRule(ContractionRule):
    """Base of the rules for recurrent layers: they read prunable features.

    Their own units stay: each is fed back into every other inside the layer, where no gate can
    stand.
    """

    folded: ClassVar = {"cell.kernel": "in"}
    weights: ClassVar = {"cell.kernel": ("in", None)}

    def out_size(self, layer: Any) -> int:
        return layer.units

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, sequence = call.operation, call.inputs[0]
        time, features = flow.of(sequence)[1:]
        flow.freeze(time, reasons.NOT_A_CHANNEL_AXIS, call.path)
        for state in call.inputs[1:]:
            flow.freeze_value(state, reasons.RECURRENT_STATE, call.path)
        features = flow.read(call, sequence, 2)
        flow.role(layer, "in", features, call.path)
        units = flow.created(call, "out", layer.units)
        flow.freeze(units, reasons.RECURRENT_STATE, call.path)
        return [[*[None] * (len(value.shape) - 1), units] for value in call.outputs]

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        steps = extents(call.inputs[0], flow, [1])
        recurrent = [int(size) for size in call.operation.cell.recurrent_kernel.shape]
        return [[*steps, *self.role_extents(call, flow, "cell.kernel")], [*steps, *recurrent]]


register_channel_rule(layers.SimpleRNN, layers.GRU, layers.LSTM)(RecurrentRule)


@register_channel_rule(layers.RepeatVector)
class RepeatVectorRule(ChannelRule):
    """`RepeatVector` adds a time axis before the channels."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        batch, channels = flow.of(call.inputs[0])
        return [[batch, None, channels]]

    def is_homogeneous(self, call: Call) -> bool:
        return True
