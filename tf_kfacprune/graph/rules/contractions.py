"""Channel rules for the layers that create channels: Dense and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.activations import freeze_by_activation
from tf_kfacprune.graph.rules.base import (
    ChannelRule,
    Count,
    Extent,
    Roles,
    Shape,
    channel_axis,
    extents,
    weight_extents,
    weight_of,
)
from tf_kfacprune.graph.rules.registry import register_channel_rule

__all__ = ["ContractionRule"]


class ContractionRule(ChannelRule):
    """Base of the rules for layers that read channels `"in"` and create channels `"out"`."""

    def channel_axis(self, call: Call) -> int:
        """The axis that the layer contracts."""
        return channel_axis(call.operation, len(call.inputs[0].shape))

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        if not self.folded:
            return {}
        axis = self.channel_axis(call)
        return {value: {axis % len(value.shape)} for value in call.inputs}

    def out_size(self, layer: Any) -> int:
        """Number of channels that the layer creates."""
        return layer.filters

    def has_plain_weights(self, layer: Any) -> bool:
        """Whether a layer's kernel is neither quantized nor adapted by LoRA."""
        adapted = getattr(layer, "lora_enabled", False)
        return not adapted and getattr(layer, "quantization_mode", None) is None

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, axis = call.operation, self.channel_axis(call)
        if not self.has_plain_weights(layer):
            (axes,) = self.freeze_all(call, flow, reasons.WEIGHTS_NOT_PLAIN)
            axes[axis] = flow.created(call, "out", self.out_size(layer))
            flow.freeze(axes[axis], reasons.WEIGHTS_NOT_PLAIN, call.path)
            return [axes]
        axes = self.other_axes(call, flow, axis)
        self.relate(call, flow, axis, self.read(call, flow, axis))
        axes[axis] = flow.created(call, "out", self.out_size(layer))
        return [freeze_by_activation(call, flow, axes)]

    def read(self, call: Call, flow: LabelFlow, axis: int) -> np.ndarray | None:
        """Labels of the input channels, which are read."""
        return flow.read(call, call.inputs[0], axis)

    def relate(self, call: Call, flow: LabelFlow, axis: int, labels: np.ndarray | None) -> None:
        """Names the labels of the input channels."""
        del axis
        flow.role(call.operation, "in", labels, call.path)

    def other_axes(self, call: Call, flow: LabelFlow, axis: int) -> Axes:
        """Labels of the output's other axes: none behind a kernel that slides over them."""
        for k, labels in enumerate(flow.of(call.inputs[0])):
            if k != axis:
                flow.freeze(labels, reasons.NOT_A_CHANNEL_AXIS, call.path)
        return [None] * len(call.outputs[0].shape)

    def role_extents(self, call: Call, flow: LabelFlow, weight: str) -> list[Extent]:
        """The extents of a weight's axes."""
        layer = call.operation
        return weight_extents(
            weight_of(layer, weight), self.weight_roles(layer)[weight], layer, flow
        )

    def positions(self, call: Call, flow: LabelFlow) -> list[Extent]:
        """Extents of the axes over which the kernel slides, in the output."""
        value, axis = call.outputs[0], self.channel_axis(call)
        return extents(value, flow, [k for k in range(1, len(value.shape)) if k != axis])

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        return [[*self.positions(call, flow), *self.role_extents(call, flow, "kernel")]]


@register_channel_rule(layers.Dense)
class DenseRule(ContractionRule):
    """`Dense` on any rank: contracts the last axis, hands on all others."""

    weights: ClassVar = {"kernel": ("in", "out"), "bias": ("out",)}
    sizes: ClassVar = {"units": "out"}
    folded: ClassVar = {"kernel": "in"}

    def out_size(self, layer: Any) -> int:
        return layer.units

    def read(self, call: Call, flow: LabelFlow, axis: int) -> np.ndarray | None:
        return flow.read_flattened(call, call.inputs[0])

    def other_axes(self, call: Call, flow: LabelFlow, axis: int) -> Axes:
        return flow.of(call.inputs[0])


@register_channel_rule(layers.Conv1D, layers.Conv2D, layers.Conv3D)
class ConvRule(ContractionRule):
    """Convolutions read channels and create new ones; groups of a grouped one stay equally large.

    With one input channel per group (depthwise), inputs and outputs are tied and whole groups go.
    Else the same slot is tied across all groups, so that groups stay equally large.
    """

    sizes: ClassVar = {"filters": "out"}
    folded: ClassVar = {"kernel": "in"}

    def weight_roles(self, layer: Any) -> Roles:
        slot = None if self._is_depthwise(layer) else "slot"
        roles: dict[str, Sequence[str | None]] = {"kernel": (*[None] * layer.rank, slot, "out")}
        if layer.bias is not None:
            roles["bias"] = ("out",)
        return roles

    def _is_depthwise(self, layer: Any) -> bool:
        return layer.groups > 1 and layer.kernel.shape[-2] == 1

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, axis = call.operation, self.channel_axis(call)
        if not self._is_depthwise(layer) or not self.has_plain_weights(layer):
            return super().propagate(call, flow)
        axes = self.other_axes(call, flow, axis)
        labels = flow.of(call.inputs[0])[axis]
        labels = flow.role(layer, "in", labels, call.path)
        if labels is not None:
            labels = np.repeat(labels, layer.filters // layer.groups)
        axes[axis] = flow.role(layer, "out", labels, call.path)
        return [freeze_by_activation(call, flow, axes)]

    def relate(self, call: Call, flow: LabelFlow, axis: int, labels: np.ndarray | None) -> None:
        layer = call.operation
        super().relate(call, flow, axis, labels)
        if layer.groups == 1:
            flow.role(layer, "slot", labels, call.path)
            return
        out = flow.created(call, "out", layer.filters)
        per_group = [out.reshape(layer.groups, -1)]
        if labels is not None:
            per_group.append(labels.reshape(layer.groups, -1))
            flow.role(layer, "slot", per_group[-1][0], call.path)
        for tied in per_group:
            for group in tied[1:]:
                flow.unite(tied[0], group, call.path)

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        super().edit_config(layer, config, count, shape)
        groups = count("in")
        if self._is_depthwise(layer) and groups is not None:
            config["groups"] = groups

    def fold(
        self, layer: Any, name: str, role: str, kernel: np.ndarray, scale: np.ndarray
    ) -> np.ndarray:
        per_group = scale.reshape(layer.groups, -1)  # group, slot
        return kernel * np.repeat(per_group, layer.filters // layer.groups, axis=0).T


@register_channel_rule(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
class ConvTransposeRule(ContractionRule):
    """Transposed convolutions, whose kernels have the output axis before the input axis."""

    sizes: ClassVar = {"filters": "out"}
    folded: ClassVar = {"kernel": "in"}

    def weight_roles(self, layer: Any) -> Roles:
        roles: dict[str, Sequence[str | None]] = {"kernel": (*[None] * layer.rank, "out", "in")}
        if layer.bias is not None:
            roles["bias"] = ("out",)
        return roles

    def positions(self, call: Call, flow: LabelFlow) -> list[Extent]:
        value, axis = call.inputs[0], self.channel_axis(call)
        return extents(value, flow, [k for k in range(1, len(value.shape)) if k != axis])


@register_channel_rule(layers.SeparableConv1D, layers.SeparableConv2D)
class SeparableConvRule(ContractionRule):
    """Separable convolutions: a depthwise kernel, then a pointwise one that mixes channels.

    Between the two there is no bias, so a gate on the input acts on the pointwise kernel too.
    """

    sizes: ClassVar = {"filters": "out"}
    folded: ClassVar = {"depthwise_kernel": "in"}

    def weight_roles(self, layer: Any) -> Roles:
        space = [None] * layer.rank
        roles: dict[str, Sequence[str | None]] = {
            "depthwise_kernel": (*space, "in", None),
            "pointwise_kernel": (*space, "mid", "out"),
        }
        if layer.bias is not None:
            roles["bias"] = ("out",)
        return roles

    def relate(self, call: Call, flow: LabelFlow, axis: int, labels: np.ndarray | None) -> None:
        super().relate(call, flow, axis, labels)
        if labels is not None:
            labels = np.repeat(labels, call.operation.depth_multiplier)
        flow.role(call.operation, "mid", labels, call.path)

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        weights = ("depthwise_kernel", "pointwise_kernel")
        space = self.positions(call, flow)
        return [[*space, *self.role_extents(call, flow, weight)] for weight in weights]


@register_channel_rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
class DepthwiseConvRule(ContractionRule):
    """Depthwise convolutions keep channels apart: channel c becomes channels c*m ... c*m+m-1.

    They are no contractions: what they put out is gated where it is read.
    """

    def weight_roles(self, layer: Any) -> Roles:
        roles: dict[str, Sequence[str | None]] = {"kernel": (*[None] * layer.rank, "in", None)}
        if layer.bias is not None:
            roles["bias"] = ("out",)
        return roles

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, axis = call.operation, self.channel_axis(call)
        axes = self.other_axes(call, flow, axis)
        labels = flow.role(layer, "in", flow.of(call.inputs[0])[axis], call.path)
        if labels is not None:
            labels = np.repeat(labels, layer.depth_multiplier)
        axes[axis] = flow.role(layer, "out", labels, call.path)
        return [freeze_by_activation(call, flow, axes)]
