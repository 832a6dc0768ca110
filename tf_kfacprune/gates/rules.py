"""Channel rules of the gate layers: labels pass, and remember the gate they have passed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tf_kfacprune.gates.neuron_gate import FeatureEdge, GateBank, GateEdge, NeuronGate
from tf_kfacprune.gates.statistic_edge import StatisticEdge
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import CONSTANT, NO_SLOT, Axes, LabelFlow
from tf_kfacprune.graph.rules import ChannelRule, register_channel_rule

__all__ = ["GateRule"]


class GateRule(ChannelRule):
    """Base of the rules for layers that gate the channels of their first input."""

    def slots(self, call: Call, flow: LabelFlow) -> np.ndarray:
        """The number of each channel's gate, `NO_SLOT` where there is none."""
        raise NotImplementedError

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        value = call.inputs[0]
        axes, axis = flow.of(value), call.operation.axis % len(value.shape)
        slots = self.slots(call, flow)
        labels = flow.select(call, value, axis)
        if labels is None:  # nothing to remove, but the gate still scales what is read
            labels = np.full(slots.shape, CONSTANT)
        axes[axis] = flow.gated(labels, slots)
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(NeuronGate)
class NeuronGateRule(GateRule):
    """`NeuronGate`: one gate of its own per channel, the same in every call."""

    def slots(self, call: Call, flow: LabelFlow) -> np.ndarray:
        gate = call.operation
        return flow.open_slots(gate, gate.size) + np.arange(gate.size)


@register_channel_rule(GateBank)
class GateBankRule(ChannelRule):
    """`GateBank`: its first output is the vector of gates that others pick from."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        bank = call.operation
        flow.slot_origin[call.outputs[0]] = flow.open_slots(bank, bank.size)
        return [[None], [None]]

    def is_homogeneous(self, call: Call) -> bool:
        return True  # it does not read its input


@register_channel_rule(GateEdge, StatisticEdge)
class GateEdgeRule(GateRule):
    """`GateEdge` and its like: pick gates by index; the index past the last means none."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        if isinstance(call.operation, StatisticEdge):
            flow.statistic_edges.update(call.outputs)
        return super().propagate(call, flow)

    def slots(self, call: Call, flow: LabelFlow) -> np.ndarray:
        indices, bank = call.operation.indices, call.inputs[1]
        is_gate = indices < (bank.shape[0] or 0)
        return np.where(is_gate, flow.slot_origin[bank] + indices, NO_SLOT)


@register_channel_rule(FeatureEdge)
class FeatureEdgeRule(GateEdgeRule):
    """`FeatureEdge`: the entries of flattened channels become neurons."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        features = flow.pick_features(call, call.inputs[0])
        return [[None, flow.gated(features, self.slots(call, flow))]]
