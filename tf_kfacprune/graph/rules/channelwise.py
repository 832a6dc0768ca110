"""Channel rules for layers that keep channels apart: scale, shift, noise, pooling, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, channel_axis, freeze_by_constant
from tf_kfacprune.graph.rules.registry import (
    existing_layers,
    register_channel_rule,
    register_internal_rule,
)

__all__: list[str] = []


@register_channel_rule(layers.BatchNormalization)
class BatchNormalizationRule(ChannelRule):
    """Batch normalization: per-channel statistics, scale and shift."""

    weights: ClassVar = dict.fromkeys(
        (
            "gamma",
            "beta",
            "moving_mean",
            "moving_variance",
            "moving_stddev",
            "renorm_mean",
            "renorm_stddev",
        ),
        ("channels",),
    )

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes = flow.of(call.inputs[0])
        flow.role(call.operation, "channels", axes[call.operation.axis], call.path)
        return [axes]


@register_internal_rule("LayerScale")
class LayerScaleRule(ChannelRule):
    """`LayerScale` of ConvNeXt: one factor per channel."""

    weights: ClassVar = {"gamma": ("channels",)}
    sizes: ClassVar = {"projection_dim": "channels"}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes = flow.of(call.inputs[0])
        flow.role(call.operation, "channels", axes[-1], call.path)
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_internal_rule("ZerosLike", "OnesLike")
class UniformRule(ChannelRule):
    """`keras.ops.zeros_like` and `ones_like`: as many channels as the tensor has."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        flow.uniform.update(call.outputs)
        return [flow.of(call.inputs[0])]


@register_internal_rule("Cumsum", "Roll")
class AlongAxisRule(ChannelRule):
    """Running sums and `roll`: the axis they go along is frozen, the others pass."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes, along = flow.of(call.inputs[0]), call.operation.axis
        if along is None and len(axes) > 1:
            return self.freeze_all(call, flow, reasons.MIXED_AXES)
        for k in (0,) if along is None else (along,) if isinstance(along, int) else along:
            flow.freeze(axes[k], reasons.NOT_A_CHANNEL_AXIS, call.path)
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(layers.Normalization, layers.Rescaling)
class ConstantsRule(ChannelRule):
    """Layers with constants: where a constant has several entries, channels are frozen."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, axes = call.operation, flow.of(call.inputs[0])
        for name in ("scale", "offset", "mean", "variance"):
            freeze_by_constant(getattr(layer, name, None), call, flow, axes)
        return [axes]


@register_channel_rule(
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.AlphaDropout,
    layers.ActivityRegularization,
)
@register_internal_rule("StochasticDepth")
class NoiseRule(ChannelRule):
    """Noise that is absent in inference, element by element."""

    is_absent = True

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        return [flow.of(call.inputs[0])]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(
    *(
        getattr(layers, f"{kind}{rank}D")
        for kind in ("MaxPooling", "AveragePooling", "ZeroPadding", "Cropping", "UpSampling")
        for rank in (1, 2, 3)
    ),
    *existing_layers(
        *(f"Adaptive{kind}Pooling{rank}D" for kind in ("Max", "Average") for rank in (1, 2, 3))
    ),
    layers.CenterCrop,
    layers.Resizing,
)
@register_internal_rule("AveragePool", "MaxPool", "Resize")
class SpatialRule(ChannelRule):
    """Pooling, padding, cropping and upsampling: channels pass, positions do not."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        value = call.inputs[0]
        channels = channel_axis(call.operation, len(value.shape))
        axes = flow.of(value)
        for k, labels in enumerate(axes):
            if k != channels:
                flow.freeze(labels, reasons.NOT_A_CHANNEL_AXIS, call.path)
                axes[k] = None
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(
    *(
        getattr(layers, f"Global{kind}Pooling{rank}D")
        for kind in ("Max", "Average")
        for rank in (1, 2, 3)
    )
)
class GlobalPoolingRule(SpatialRule):
    """Global pooling: channels pass, positions vanish."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        ((*axes,),) = super().propagate(call, flow)
        if call.operation.keepdims:
            return [axes]
        channels = channel_axis(call.operation, len(call.inputs[0].shape))
        return [[axes[0], axes[channels]]]
