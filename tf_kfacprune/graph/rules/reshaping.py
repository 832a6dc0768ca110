"""Channel rules for operations that only move elements: the operation itself moves the labels.

Running the operation on an array of labels and reading the labels back is right for every shape
and order of axes, and needs no formula of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import layers, ops

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Count, Removal, Shape
from tf_kfacprune.graph.rules.registry import register_channel_rule, register_internal_rule

__all__: list[str] = []

_STAND_IN = 2  # size of an axis of unknown size while labels are being moved


@register_channel_rule(layers.Flatten, layers.Permute)
@register_internal_rule(
    *("ExpandDims", "Flip", "Moveaxis", "SpaceToDepth", "Squeeze", "Swapaxes", "Transpose")
)
class IndexRule(ChannelRule):
    """Operations that only move elements: labels move along, split channels go as a whole."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        value = call.inputs[0]
        result: Axes = [None] * len(call.outputs[0].shape)
        for k, labels in enumerate(flow.of(value)):
            if labels is None:
                continue
            if (labels == labels[0]).all():  # cannot be told from an axis without channels
                single = len(labels) == 1
                reason = reasons.ONLY_NEURON if single else reasons.ALL_COUPLED
                flow.freeze(labels, reason, call.path)
                continue
            moved = self._move(call, flow, k, labels)
            if moved is None or result[moved[0]] is not None:
                flow.freeze(labels, reasons.MIXED_AXES, call.path)
                if moved is not None:
                    flow.freeze(result[moved[0]], reasons.MIXED_AXES, call.path)
            else:
                result[moved[0]] = moved[1]
        return [result]

    def _move(
        self, call: Call, flow: LabelFlow, axis: int, labels: np.ndarray
    ) -> tuple[int, np.ndarray] | None:
        """Where the labels of one axis end up: (axis, labels), or None if they are mixed up.

        If they spread over several axes (channels become heads x dimensions), labels are tied
        within one of these axes, so that whole heads go; see `leading`.
        """
        value, target = call.inputs[0], call.outputs[0].shape
        moved = _moved(call, axis, labels, [size or _STAND_IN for size in value.shape])
        if moved is None and None in value.shape:
            sizes = flow.sizes(value)  # which fit together, but are large
            moved = _moved(call, axis, labels, [size or _STAND_IN for size in sizes])
        if moved is None or moved.ndim != len(target):
            return None
        varying = [k for k in range(moved.ndim) if (np.diff(moved, axis=k) != 0).any()]
        if not varying:
            return None
        leading = self.leading(call, varying, moved.shape)
        if target[leading] != moved.shape[leading]:  # a size known only at run time
            return None
        rows = np.moveaxis(moved, leading, 0).reshape(moved.shape[leading], -1)
        if len(varying) > 1:
            for column in rows.T[1:]:
                flow.unite(rows[:, 0], column, call.path)
        return leading, rows[:, 0]

    def leading(self, call: Call, varying: Sequence[int], shape: Sequence[int]) -> int:
        """Of the axes over which channels spread, the one whose entries can go; others are tied.

        Usually the first (heads, then dimensions), but not of two or three tensors in one (queries,
        keys and values, each of several heads), and the last if the units of a layer become an
        image, or the channels of an image square blocks of pixels.

        Args:
            call: The call.
            varying: The axes over which channels spread, in ascending order.
            shape: Sizes of all axes.

        Returns:
            One of `varying`.
        """
        if len(varying) > 2:
            rank = len(call.inputs[0].shape)
            if rank == 2 or (rank == 4 and shape[varying[0]] == shape[varying[1]]):
                return varying[-1]
            if shape[varying[0]] <= 3:
                return varying[1]
        return varying[0]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_internal_rule("DepthToSpace")
class DepthToSpaceRule(IndexRule):
    """`keras.ops.depth_to_space`: a channel goes with its pixels, which were channels before."""

    def leading(self, call: Call, varying: Sequence[int], shape: Sequence[int]) -> int:
        return 1 if call.operation.data_format == "channels_first" else 3


def _moved(call: Call, axis: int, labels: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    """What the operation makes of the labels along an axis, or None if the shape does not fit."""
    along = [-1 if k == axis else 1 for k in range(len(shape))]
    array = np.broadcast_to(labels.reshape(along), shape).astype("int32")
    try:
        return np.array(call.operation.call(ops.convert_to_tensor(array)))
    except Exception:  # noqa: BLE001 (of the backend: sizes put in for unknown ones do not fit)
        return None


def _target(shape: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(-1 if size is None else size for size in shape)


@register_channel_rule(layers.Reshape)
class ReshapeRule(IndexRule):
    """`Reshape`: its target shape shrinks with the channels."""

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        config["target_shape"] = _target(shape[1:])


@register_internal_rule("Reshape")
class ReshapeOperatorRule(IndexRule):
    """`keras.ops.reshape`: as the layer."""

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        left = removal.shape(call.outputs[0])
        before = call.outputs[0].shape
        # What was -1 or computed stays so; what counted channels counts those that are left.
        asked = call.operation.newshape
        newshape = [n if a == b else a for n, a, b in zip(asked, left, before, strict=True)]
        return ops.reshape(args[0], newshape)


@register_internal_rule("Repeat")
class RepeatRule(IndexRule):
    """`keras.ops.repeat`: the copies of a channel go together."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        operation = call.operation
        if operation.axis is None or not isinstance(operation.repeats, int):
            return self.freeze_all(call, flow, reasons.PICKED)
        axis = operation.axis % len(call.inputs[0].shape)
        axes = flow.of(call.inputs[0])
        labels = axes[axis]
        if labels is not None:
            axes[axis] = np.repeat(labels, operation.repeats)
        return [axes]


@register_internal_rule("Tile")
class TileRule(IndexRule):
    """`keras.ops.tile`: the copies of a channel go together."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        repeats, axes = call.operation.repeats, flow.of(call.inputs[0])
        repeats = [repeats] if isinstance(repeats, int) else [*repeats]
        if not all(isinstance(n, int) for n in repeats):
            return self.freeze_all(call, flow, reasons.PICKED)
        rank = max(len(repeats), len(axes))
        repeats = [*[1] * (rank - len(repeats)), *repeats]
        axes = [*[None] * (rank - len(axes)), *axes]
        pairs = zip(axes, repeats, strict=True)
        return [[None if labels is None else np.tile(labels, n) for labels, n in pairs]]


_STATISTICS = {
    "All": "all",
    "Amax": "max",
    "Amin": "min",
    "Any": "any",
    "Max": "max",
    "Mean": "mean",
    "Min": "min",
    "Norm": "sum",  # of absolute values, or of squares
    "Std": "variance",
    "Sum": "sum",
    "Var": "variance",
}


@register_internal_rule(
    *("All", "Any", "Mean", "Sum", "Max", "Min", "Amax", "Amin", "Prod", "Std", "Var", "Norm")
)
class ReductionRule(ChannelRule):
    """Reductions over positions pass channels; statistics over channels read them.

    Statistics are sums, means, variances, largest and smallest values, norms of order 1 or 2, `any`
    and `all`. A product over channels freezes them.
    """

    def reduced(self, call: Call) -> set[int]:
        """The axes that are reduced."""
        rank, axis = len(call.inputs[0].shape), call.operation.axis
        axis = range(rank) if axis is None else axis
        return {k % rank for k in ((axis,) if isinstance(axis, int) else axis)}

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        is_read = type(call.operation).__name__ in _STATISTICS
        return {call.inputs[0]: self.reduced(call)} if is_read else {}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        value, operation = call.inputs[0], call.operation
        reduced = self.reduced(call)
        axes = flow.of(value)
        labelled = [k for k in reduced if axes[k] is not None]
        statistic = _STATISTICS.get(type(operation).__name__)
        if getattr(operation, "ord", None) not in (None, 1, 2, "euclidean", "fro"):
            statistic = None
        is_over_channels = len(labelled) == 1 and labelled[0] != 0
        if statistic == "variance":
            is_over_channels = is_over_channels and len(reduced) == 1
        if statistic and is_over_channels:
            flow.read_statistic(call, value, labelled[0], statistic)
        else:
            for k in labelled:
                flow.freeze(axes[k], reasons.REDUCED, call.path)
        for k in reduced:
            axes[k] = None
        kept = [labels for k, labels in enumerate(axes) if k not in reduced]
        return [axes if operation.keepdims else kept]


@register_internal_rule("Normalize")
class NormalizeRule(ChannelRule):
    """`keras.ops.normalize`, by a norm of order 1 or 2: over channels, closed ones add nothing."""

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        value = call.inputs[0]
        return {value: {call.operation.axis % len(value.shape)}}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        value, operation = call.inputs[0], call.operation
        axes = flow.of(value)
        axis = operation.axis % len(axes)
        if operation.order in (1, 2) and axis != 0:
            flow.read_statistic(call, value, axis, "sum")
        else:
            flow.freeze(axes[axis], reasons.REDUCED, call.path)
        if axes[axis] is not None:
            axes[axis] = flow.base(axes[axis])
        return [axes]
