"""Channel rules for activation functions, whether layers, operators or arguments of other layers.

An activation is let through only if it is known to work on each element alone. Known are the
functions of `keras.activations` and their namesakes in `keras.ops` and the backends; any other
function is recorded on a symbolic tensor, and what it is made of decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
from keras import layers, ops, tree

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, freeze_by_constant
from tf_kfacprune.graph.rules.registry import (
    register_channel_rule,
    register_internal_rule,
    rule_for,
)
from tf_kfacprune.graph.tracer import calls_of

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
    return None if callable(function) and is_elementwise(function) else reasons.UNKNOWN_ACTIVATION


def is_elementwise(function: Any) -> bool:
    """Whether a function of the user's own works on each element alone.

    What it does to a symbolic tensor is recorded; all of it must be element by element. Then it is
    run on numbers, all channels together and each by itself, which must give the same.
    """
    try:
        known = _ELEMENTWISE_FUNCTIONS.get(function)
    except TypeError:  # neither hashable nor weakly referable
        return _records_elementwise(function)
    if known is None:
        known = _records_elementwise(function)
        with suppress(TypeError):
            _ELEMENTWISE_FUNCTIONS[function] = known
    return known


_ELEMENTWISE_FUNCTIONS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _records_elementwise(function: Any) -> bool:
    inputs = keras.Input((5,))
    numbers = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    try:
        _, calls, (output,) = calls_of(keras.Function(inputs, function(inputs)))
        together = ops.convert_to_numpy(function(ops.convert_to_tensor(numbers)))
        columns = [function(ops.convert_to_tensor(numbers[:, k : k + 1])) for k in range(5)]
        apart = np.concatenate([ops.convert_to_numpy(column) for column in columns], axis=1)
    except Exception:  # noqa: BLE001 (whatever it raises, it is not known to be one)
        return False
    is_plain = all(_is_elementwise_call(call) for call in calls) and output.shape == (None, 5)
    return is_plain and bool(np.allclose(together, apart, rtol=1e-4, atol=1e-6, equal_nan=True))


def _is_elementwise_call(call: Call) -> bool:
    rule = rule_for(call.operation)
    if isinstance(rule, ActivationRule):
        return activation_reason(call.operation.activation) is None
    constants = [x for x in tree.flatten((call.args, call.kwargs)) if not isinstance(x, Value)]
    single = all(np.size(x) == 1 for x in constants if x is not None)
    same = all(value.shape == (None, 5) for value in (*call.inputs, *call.outputs))
    # By name: the rule of sums and products stands on this module.
    combines = type(rule).__name__ in ("MergeRule", "HomogeneousMergeRule")
    return single and same and (type(rule) in _ELEMENTWISE_RULES or combines)


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
@register_internal_rule("Relu", "LeakyRelu", "StopGradient", "ConvertToTensor")
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


_ELEMENTWISE_RULES = (ElementwiseRule, HomogeneousRule, ReLURule)


@register_internal_rule("Softmax", "LogSoftmax", "Sparsemax", "Glu")
class CrossChannelOperatorRule(ChannelRule):
    """Operators that mix the entries of an axis: its channels are frozen, other axes pass."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes, axis = flow.of(call.inputs[0]), call.operation.axis
        mixed = range(len(axes)) if axis is None else (axis,) if isinstance(axis, int) else axis
        for k in mixed:
            flow.freeze(axes[k], reasons.CROSS_CHANNEL_ACTIVATION, call.path)
            axes[k] = None
        return [axes]
