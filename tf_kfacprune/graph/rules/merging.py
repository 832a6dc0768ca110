"""Channel rules for operations on several tensors: sums, products, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import layers, tree

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import CONSTANT, Axes, LabelFlow
from tf_kfacprune.graph.rules.base import (
    ChannelRule,
    Removal,
    cut_constant,
    follow_constant,
    freeze_by_constant,
)
from tf_kfacprune.graph.rules.registry import register_channel_rule, register_internal_rule

__all__: list[str] = []


@register_channel_rule(layers.Multiply)
@register_internal_rule(
    *("Add", "Arctan2", "Divide", "DivideNoNan", "FloorDivide", "Logaddexp", "Maximum", "Minimum"),
    *("Mod", "Multiply", "Power", "Subtract", "TrueDivide", "Where"),
    *("Equal", "Greater", "GreaterEqual", "Less", "LessEqual", "NotEqual"),
    *("LogicalAnd", "LogicalOr", "LogicalXor"),
)
class MergeRule(ChannelRule):
    """Element-wise combination with broadcasting: coupled channels live and die together.

    Axes are aligned from the right. A single channel that is broadcast over many is frozen. An
    array constant among the operands loses the entries of the channels that go.
    """

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        shape = call.outputs[0].shape
        merged: Axes = []
        for k in range(1, len(shape) + 1):
            merged.insert(0, self._merge_axis(call, flow, k, shape[-k]))
        for leaf in tree.flatten((call.args, call.kwargs)) if call.is_layer else ():
            if not isinstance(leaf, Value):
                freeze_by_constant(leaf, call, flow, merged)
        return [merged]

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        value = call.outputs[0]
        kept = {k - len(value.shape): removal.kept(value, k) for k in range(len(value.shape))}

        def cut(recorded: Any, given: Any) -> Any:
            if isinstance(recorded, Value):
                return given
            rank = len(np.shape(given))
            return cut_constant(given, {axis: kept[axis] for axis in range(-rank, 0)})

        fewer = [cut(*pair) for pair in zip(call.args, args, strict=True)]
        named = {key: cut(call.kwargs[key], given) for key, given in kwargs.items()}
        same = all(a is b for a, b in zip(args, fewer, strict=True))
        if same and all(named[key] is given for key, given in kwargs.items()):
            return NotImplemented
        return type(call.operation)()(*fewer, **named)

    def _merge_axis(
        self, call: Call, flow: LabelFlow, k: int, size: int | None
    ) -> np.ndarray | None:
        """Unites the operands on the k-th axis from the right."""
        present = []
        for value in dict.fromkeys(call.inputs):
            if len(value.shape) < k:
                continue
            if value.shape[-k] == 1 and size != 1:
                flow.freeze(flow.of(value)[-k], reasons.BROADCAST, call.path)
            else:
                present.append(value)
        if not present:
            return self._follow(call, flow, k)
        if all(flow.of(value)[-k] is None for value in present):
            return None
        operands = [flow.select(call, value, len(value.shape) - k) for value in present]
        result = operands[0]
        for labels in operands[1:]:
            result = flow.unite(result, labels, call.path)
        return result

    def _follow(self, call: Call, flow: LabelFlow, k: int) -> np.ndarray | None:
        """Labels of an axis that only an array constant has."""
        for leaf in () if call.is_layer else (*call.args, *call.kwargs.values()):
            if not isinstance(leaf, Value) and len(np.shape(leaf)) >= k and np.shape(leaf)[-k] > 1:
                return follow_constant(leaf, -k, call, flow, "constant")
        return None


@register_channel_rule(layers.Add, layers.Subtract, layers.Average, layers.Maximum, layers.Minimum)
@register_internal_rule("CustomScaleLayer")
class HomogeneousMergeRule(MergeRule):
    """Sums and their like, f(z x, z y) = z f(x, y): coupled channels live and die together."""

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_channel_rule(layers.Concatenate)
class ConcatenateRule(ChannelRule):
    """Concatenation: labels are concatenated; along the other axes operands are united."""

    def axis(self, call: Call) -> int:
        """The concatenated axis."""
        return call.operation.axis

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        rank = len(call.outputs[0].shape)
        joined = self.axis(call) % rank
        return [
            [
                self._join(call, flow, k) if k == joined else self._unite(call, flow, k)
                for k in range(rank)
            ]
        ]

    def _join(self, call: Call, flow: LabelFlow, k: int) -> np.ndarray | None:
        if all(flow.of(value)[k] is None for value in call.inputs):
            return None
        parts = []
        for value in call.inputs:
            labels = flow.select(call, value, k)
            if labels is None:
                labels = np.full(value.shape[k] or 0, CONSTANT)
            parts.append(labels)
        return np.concatenate(parts)

    def _unite(self, call: Call, flow: LabelFlow, k: int) -> np.ndarray | None:
        operands = [flow.of(value)[k] for value in call.inputs]
        result = operands[0]
        for labels in operands[1:]:
            result = flow.unite(result, labels, call.path)
        return result

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_internal_rule("Concatenate")
class ConcatenateOperatorRule(ConcatenateRule):
    """`keras.ops.concatenate`: as the layer; array constants among the operands freeze."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        constants = [x for x in tree.flatten(call.args) if not isinstance(x, Value)]
        if constants:
            return self.freeze_all(call, flow, reasons.ARRAY_CONSTANT)
        return super().propagate(call, flow)


@register_internal_rule("Stack")
class StackRule(ConcatenateOperatorRule):
    """`keras.ops.stack`: a new axis of positions; along the others operands are united."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        constants = [x for x in tree.flatten(call.args) if not isinstance(x, Value)]
        if constants:
            return self.freeze_all(call, flow, reasons.ARRAY_CONSTANT)
        axes = [self._unite(call, flow, k) for k in range(len(call.inputs[0].shape))]
        axes.insert(self.axis(call) % len(call.outputs[0].shape), None)
        return [axes]
