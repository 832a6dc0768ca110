"""Channel rules for activation functions, whether layers, operators or arguments of other layers.

An activation is let through only if it is known to work on each element alone. Known are the
functions of `keras.activations` and their namesakes in `keras.ops` and the backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, freeze_by_constant
from tf_kfacprune.graph.rules.registry import register_channel_rule, register_internal_rule

__all__ = ["activation_reason", "freeze_by_activation"]

ELEMENTWISE = frozenset(
    {
        *("celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu"),
        *("hard_swish", "hard_tanh", "leaky_relu", "linear", "log_sigmoid", "mish", "relu"),
        *("relu6", "selu", "sigmoid", "silu", "soft_shrink", "softplus", "softsign"),
        *("sparse_plus", "sparse_sigmoid", "squareplus", "swish", "tanh", "tanh_shrink"),
        "threshold",
    }
)
ACROSS_CHANNELS = frozenset({"softmax", "log_softmax", "sparsemax", "glu"})
HOMOGENEOUS = frozenset({"linear", "relu", "leaky_relu"})
_LIBRARIES = frozenset({"keras", "tensorflow", "jax", "torch"})
_ELEMENTWISE_LAYERS = (layers.ReLU, layers.LeakyReLU, layers.ELU)


def _name(function: Any) -> str | None:
    """The name of a library function; None for anything of the user's own."""
    library = (getattr(function, "__module__", None) or "").split(".")[0]
    return getattr(function, "__name__", None) if library in _LIBRARIES else None


def activation_reason(function: Any) -> str | None:
    """Why channels behind an activation function are frozen, or None if they are not."""
    if function is None or type(function) in _ELEMENTWISE_LAYERS or _name(function) in ELEMENTWISE:
        return None
    if isinstance(function, layers.Softmax) or _name(function) in ACROSS_CHANNELS:
        return reasons.CROSS_CHANNEL_ACTIVATION
    return reasons.UNKNOWN_ACTIVATION


def freeze_by_activation(call: Call, flow: LabelFlow, axes: Axes) -> Axes:
    """Freezes the labels of a layer's output if its `activation` mixes channels."""
    reason = activation_reason(call.operation.activation)
    if reason is not None:
        for labels in axes:
            flow.freeze(labels, reason, call.path)
    return axes


@register_channel_rule(layers.Activation)
class ActivationRule(ChannelRule):
    """`Activation`: each element alone, unless the function mixes channels."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        return [freeze_by_activation(call, flow, flow.of(call.inputs[0]))]

    def is_homogeneous(self, call: Call) -> bool:
        return _name(call.operation.activation) in HOMOGENEOUS


@register_channel_rule(layers.ELU)
@register_internal_rule(
    *("Abs", "Absolute", "Arcsinh", "Arctan", "Cast", "Cbrt", "Ceil", "Celu", "Copy", "Cos"),
    *("Cosh", "Elu", "Erf", "Erfc", "Exp", "Exp2", "Expm1", "Isfinite", "Isnan", "Log10", "Log2"),
    *("LogicalNot", "NanToNum", "Sinc", "Sinh", "Tan", "Trunc"),
    *("Floor", "Gelu", "HardShrink", "HardSigmoid", "HardSilu", "HardTanh", "Log", "Log1p"),
    *("LogSigmoid", "Negative", "Reciprocal", "Relu6", "Round", "Rsqrt", "Selu", "Sigmoid"),
    *("Sign", "Silu", "Sin", "SoftShrink", "Softplus", "Softsign", "SparsePlus"),
    *("SparseSigmoid", "Sqrt", "Square", "Squareplus", "Tanh", "TanhShrink", "Threshold"),
)
class ElementwiseRule(ChannelRule):
    """Functions of each element alone: channels pass."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        return [flow.of(call.inputs[0])]


@register_internal_rule("Clip")
class ClipRule(ElementwiseRule):
    """`keras.ops.clip`, whose limits may differ from channel to channel."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes = flow.of(call.inputs[0])
        for limit in (call.operation.x_min, call.operation.x_max):
            freeze_by_constant(limit, call, flow, axes)
        return [axes]


@register_channel_rule(layers.LeakyReLU, layers.Identity)
@register_internal_rule("Relu", "LeakyRelu", "StopGradient")
class HomogeneousRule(ElementwiseRule):
    """Functions of each element alone with f(z x) = z f(x): channels pass, gates too."""

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(layers.ReLU)
class ReLURule(ElementwiseRule):
    """`ReLU`, homogeneous unless it has a ceiling or a threshold."""

    def is_homogeneous(self, call: Call) -> bool:
        return call.operation.max_value is None and not call.operation.threshold


@register_channel_rule(layers.PReLU)
class PReLURule(ElementwiseRule):
    """`PReLU`: its slopes have one entry per channel (and per position of unshared axes)."""

    def weight_roles(self, layer: keras.Layer) -> dict[str, Sequence[str | None]]:
        shape = layer.alpha.shape
        return {"alpha": [f"axis{k + 1}" if size > 1 else None for k, size in enumerate(shape)]}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes = flow.of(call.inputs[0])
        for k, size in enumerate(call.operation.alpha.shape, start=1):
            if size > 1:
                flow.role(call.operation, f"axis{k}", axes[k], call.path)
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(layers.Softmax)
class SoftmaxRule(ChannelRule):
    """`Softmax` freezes the axes it normalizes; every other axis passes."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes = flow.of(call.inputs[0])
        axis = call.operation.axis
        for k in (axis,) if isinstance(axis, int) else axis:
            flow.freeze(axes[k], reasons.CROSS_CHANNEL_ACTIVATION, call.path)
        return [axes]


@register_internal_rule("Softmax", "LogSoftmax", "Sparsemax", "Glu")
class CrossChannelOperatorRule(ChannelRule):
    """Operators that mix the entries of an axis: all channels are frozen."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        return self.freeze_all(call, flow, reasons.CROSS_CHANNEL_ACTIVATION)
