"""Channel rules for layers around another layer, whose own rule does the work.

`TimeDistributed` applies it to every step of a sequence: its rule gets a call without time axis.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Count, Extent, Roles, Shape, extents
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import has_rule, register_channel_rule, rule_for

__all__: list[str] = []

_PREFIX = "layer."  # where the weights of the wrapped layer are


class WrapperRule(ContractionRule):
    """Base of the rules for layers around one layer: weights and configuration are that one's."""

    def inner_shape(self, shape: Shape) -> Shape:
        """What the wrapped layer puts out, from what the layer around it does."""
        return shape

    def why_opaque(self, layer: Any) -> str | None:
        if not has_rule(layer.layer):
            return reasons.WRAPPED_UNKNOWN
        return rule_for(layer.layer).why_opaque(layer.layer)

    def why_frozen(self, layer: Any) -> str | None:
        """Why nothing of the wrapped layer can be removed, or None if its rule decides."""
        reads_inside = type(rule_for(layer.layer)).call_gated is not ChannelRule.call_gated
        return self.why_opaque(layer) or (reasons.UNKNOWN_OPERATION if reads_inside else None)

    def weight_roles(self, layer: Any) -> Roles:
        roles = rule_for(layer.layer).weight_roles(layer.layer)
        return {_PREFIX + name: axes for name, axes in roles.items()}

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        inner = config["layer"]
        inner.pop("build_config", None)
        rule = rule_for(layer.layer)
        rule.edit_config(layer.layer, inner["config"], count, self.inner_shape(shape))

    def fold(
        self, layer: Any, name: str, role: str, kernel: np.ndarray, scale: np.ndarray
    ) -> np.ndarray:
        name = name.removeprefix(_PREFIX)
        return rule_for(layer.layer).fold(layer.layer, name, role, kernel, scale)


@register_channel_rule(layers.TimeDistributed)
class TimeDistributedRule(WrapperRule):
    """`TimeDistributed`: as the wrapped layer; frozen if that reads channels inside."""

    folded: ClassVar = {f"{_PREFIX}kernel": "in", f"{_PREFIX}depthwise_kernel": "in"}

    def channel_axis(self, call: Call) -> int:
        inner = rule_for(call.operation.layer)
        if not isinstance(inner, ContractionRule) or not inner.folded:
            return 0  # contracts nothing
        step = _without_time(call.inputs[0], call.inputs[0].shape)
        inner_call = Call(call.operation.layer, (step,), {}, (), call.path)
        return inner.channel_axis(inner_call) % len(step.shape) + 1

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, value = call.operation, call.inputs[0]
        rule = rule_for(layer.layer)
        if reason := self.why_frozen(layer):
            return self.freeze_all(call, flow, reason)
        step, made = (_without_time(v, v.shape) for v in (value, call.outputs[0]))
        flow.axes[step] = _without_time_axis(flow.of(value))
        first = len(flow.readings)
        (axes,) = rule.propagate(Call(layer.layer, (step,), {}, (made,), call.path), flow)
        flow.readings[first:] = [
            replace(reading, call=call, value=value, axis=reading.axis % len(step.shape) + 1)
            for reading in flow.readings[first:]
        ]
        flow.share_roles(layer, layer.layer)
        return [[axes[0], flow.of(value)[1], *axes[1:]]]

    def is_homogeneous(self, call: Call) -> bool:
        step, made = (_without_time(v, v.shape) for v in (call.inputs[0], call.outputs[0]))
        inner = Call(call.operation.layer, (step,), {}, (made,), call.path)
        return rule_for(inner.operation).is_homogeneous(inner)

    def inner_shape(self, shape: Shape) -> Shape:
        return (shape[0], *shape[2:])

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        values = (call.inputs[0], call.outputs[0])
        step, made = (_without_time(v, flow.sizes(v)) for v in values)
        for short, value in ((step, values[0]), (made, values[1])):
            flow.axes[short] = _without_time_axis(flow.of(value))
        inner = Call(call.operation.layer, (step,), {}, (made,), call.path)
        time = extents(call.inputs[0], flow, [1])
        return [[*time, *product] for product in rule_for(inner.operation).macs(inner, flow)]


def _without_time(value: Value, shape: Sequence[int | None]) -> Value:
    return Value((shape[0], *shape[2:]), value.dtype)


def _without_time_axis(axes: Axes) -> Axes:
    return [axes[0], *axes[2:]]


@register_channel_rule(layers.SpectralNormalization)
class SpectralNormalizationRule(WrapperRule):
    """`SpectralNormalization`: as the wrapped layer, whose kernel it scales in training."""

    def folded_roles(self, name: str) -> tuple[str, ...]:
        letters = (f"in_{letter}" for letter in string.ascii_letters)  # of an `EinsumDense`
        return ("in", *letters) if name == f"{_PREFIX}kernel" else ()

    def inner(self, call: Call) -> Call:
        """The call of the wrapped layer."""
        kwargs = {key: value for key, value in call.kwargs.items() if key != "training"}
        return Call(call.operation.layer, call.args, kwargs, call.outputs, call.path)

    def channel_axis(self, call: Call) -> int:
        rule = rule_for(call.operation.layer)
        return rule.channel_axis(self.inner(call)) if isinstance(rule, ContractionRule) else -1

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        return rule_for(call.operation.layer).read_axes(self.inner(call))

    def out_size(self, layer: Any) -> int:
        rule = rule_for(layer.layer)
        return rule.out_size(layer.layer) if isinstance(rule, ContractionRule) else 0

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, value, inner = call.operation, call.inputs[0], self.inner(call)
        rule = rule_for(layer.layer)
        if reason := self.why_frozen(layer):
            return self.freeze_all(call, flow, reason)
        first = len(flow.readings)
        axes = rule.propagate(inner, flow)
        flow.readings[first:] = [replace(reading, call=call) for reading in flow.readings[first:]]
        if (inner, value) in flow.selections:
            flow.selections[call, value] = flow.selections.pop((inner, value))
        flow.share_roles(layer, layer.layer)
        return axes

    def weight_roles(self, layer: Any) -> Roles:
        roles = rule_for(layer.layer).weight_roles(layer.layer)
        columns = roles.get("kernel", roles.get("embeddings", (None,)))[-1]
        return {**super().weight_roles(layer), "vector_u": (None, columns)}

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        return rule_for(call.operation.layer).macs(self.inner(call), flow)
