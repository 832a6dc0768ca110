"""Channel rules for operations that cut tensors into parts: split and slicing.

A part of a layer's channels forms groups of its own, so that every part keeps at least one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Removal
from tf_kfacprune.graph.rules.registry import register_internal_rule

__all__: list[str] = []


@register_internal_rule("Split")
class SplitRule(ChannelRule):
    """`keras.ops.split`: each part of the channels forms a group of its own."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        value = call.inputs[0]
        axis = call.operation.axis % len(value.shape)
        axes = flow.of(value)
        labels, parts = axes[axis], []
        sizes = [output.shape[axis] or 0 for output in call.outputs]
        stops = np.cumsum(sizes).tolist()
        for start, stop in zip([0, *stops], stops, strict=False):
            part = None if labels is None else labels[start:stop]
            if part is not None:
                flow.separate(part)
            parts.append([part if k == axis else other for k, other in enumerate(axes)])
        return parts

    def is_homogeneous(self, call: Call) -> bool:
        return True

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        axis = call.operation.axis
        sizes = [removal.shape(value)[axis] for value in call.outputs]
        if None in sizes:  # equal parts of the batch, say
            return NotImplemented
        return ops.split(args[0], np.cumsum(sizes)[:-1].tolist(), axis=axis)


@register_internal_rule("GetItem")
class GetItemRule(ChannelRule):
    """`x[..., a:b:c]` and its like: a range of channels forms a group, single ones are frozen.

    `None` in the key makes a new axis.
    """

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        value = call.inputs[0]
        keys = _keys(call, len(value.shape))
        if keys is None:
            return self.freeze_all(call, flow, reasons.UNKNOWN_OPERATION)
        is_uniform = value in flow.uniform
        if is_uniform:
            flow.uniform.update(call.outputs)
        axes: Axes = []
        given = iter(flow.of(value))
        for key in keys:
            labels = None if key is None else next(given)
            if key is None:
                axes.append(None)
                continue
            if isinstance(key, int):  # a single channel, which must stay where it is
                if not (is_uniform and key == 0):  # else any channel will do
                    flow.freeze(labels, reasons.PICKED, call.path)
                continue
            part = None if labels is None else labels[key]
            if labels is not None and part is not None and len(part) < len(labels):
                flow.separate(part)
            axes.append(part)
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        value = call.inputs[0]
        keys = _keys(call, len(value.shape))
        if keys is None:
            return NotImplemented
        moved: list[int | slice | None] = []
        axis, tensor = -1, args[0]
        for key in keys:
            axis += key is not None
            kept = None if key is None else removal.kept(value, axis)
            if kept is None or not isinstance(key, slice):
                moved.append(key)
                continue
            picked = np.arange(value.shape[axis] or 0)[key]
            picked = np.searchsorted(kept, picked[np.isin(picked, kept)])
            moved.append(_as_slice(picked))
            if moved[-1] is None:  # not the key of a new axis
                moved[-1] = slice(None)
                tensor = ops.take(tensor, picked.tolist(), axis=axis)
        return tensor[tuple(moved)]


def _keys(call: Call, rank: int) -> list[int | slice | None] | None:
    """The key of each axis and None for each new one; None if it is a key of another kind."""
    key = call.args[1] if len(call.args) > 1 else call.kwargs.get("key")
    keys: list[Any] = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(k is None or k is Ellipsis or isinstance(k, (int, slice)) for k in keys):
        return None
    missing = rank - sum(isinstance(k, (int, slice)) for k in keys)
    where = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys[where : where + 1] = [slice(None)] * missing
    plain = all(_is_plain(k) for k in keys if isinstance(k, slice))
    return keys if plain and missing >= 0 else None


def _is_plain(key: slice) -> bool:
    return all(isinstance(end, (int, type(None))) for end in (key.start, key.stop, key.step))


def _as_slice(positions: np.ndarray) -> slice | None:
    """The slice that picks the given positions in order, or None if they have no fixed distance."""
    first, last = int(positions[0]), int(positions[-1])
    steps = np.unique(np.diff(positions))
    if len(steps) > 1:
        return None
    step = int(steps[0]) if len(steps) else 1
    stop = last + (1 if step > 0 else -1)
    return slice(first, stop if stop >= 0 else None, step)


@register_internal_rule("Take")
class TakeRule(ChannelRule):
    """`keras.ops.take`: entries are picked by number along one axis, the other axes pass.

    A list of numbers that is fixed picks a part of the channels, which keeps at least one.
    """

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axis, data = call.operation.axis, call.args[0]
        indices = call.args[1] if len(call.args) > 1 else call.kwargs.get("indices")
        if axis is None or not isinstance(data, Value):
            return self.freeze_all(call, flow, reasons.PICKED)
        if isinstance(indices, Value):
            flow.freeze_value(indices, reasons.NOT_A_CHANNEL_AXIS, call.path)
        rank = len(call.outputs[0].shape) - len(data.shape) + 1
        axes = flow.of(data)
        axis %= len(axes)
        labels, picked = axes[axis], _picked(indices)
        if labels is not None and picked is not None:
            axes[axis] = labels[picked]
            flow.separate(labels[picked])
            return [axes]
        flow.freeze(labels, reasons.PICKED, call.path)
        axes[axis : axis + 1] = [None] * rank
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        value, axis = call.args[0], call.operation.axis
        indices = call.args[1] if len(call.args) > 1 else call.kwargs.get("indices")
        picked = _picked(indices)
        if picked is None or axis is None or not isinstance(value, Value):
            return NotImplemented
        kept = removal.kept(value, axis % len(value.shape))
        if kept is None:
            return NotImplemented
        picked = picked % (value.shape[axis] or 1)
        left = np.searchsorted(kept, picked[np.isin(picked, kept)])
        return ops.take(args[0], left.tolist(), axis=axis)


def _picked(indices: Any) -> np.ndarray | None:
    """Fixed numbers in a list, of several entries, or None if they are something else."""
    is_list = isinstance(indices, (list, tuple)) and all(isinstance(n, int) for n in indices)
    return np.array(indices) if is_list and len(indices) > 1 else None


@register_internal_rule("TakeAlongAxis")
class TakeAlongAxisRule(ChannelRule):
    """`keras.ops.take_along_axis`: as `take`; axes along which the numbers are the same pass."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axis, data = call.operation.axis, call.args[0]
        indices = call.args[1] if len(call.args) > 1 else call.kwargs["indices"]
        if axis is None or not isinstance(data, Value):
            return self.freeze_all(call, flow, reasons.PICKED)
        if isinstance(indices, Value):
            flow.freeze_value(indices, reasons.NOT_A_CHANNEL_AXIS, call.path)
        axes = flow.of(data)
        axis %= len(axes)
        for k, size in enumerate(indices.shape):
            if k == axis or size != 1:
                flow.freeze(axes[k], reasons.PICKED, call.path)
                axes[k] = None
        return [axes]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_internal_rule("Unstack")
class UnstackRule(ChannelRule):
    """`keras.ops.unstack`: one tensor per position of an axis, which must stay as it is."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes = flow.of(call.inputs[0])
        flow.freeze(axes.pop(call.operation.axis % len(axes)), reasons.PICKED, call.path)
        return [list(axes) for _ in call.outputs]

    def is_homogeneous(self, call: Call) -> bool:
        return True


@register_internal_rule("Pad")
class PadRule(ChannelRule):
    """`keras.ops.pad` with zeros: padded axes are positions, the others pass."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        axes = flow.of(call.inputs[0])
        widths = call.operation.pad_width
        for k, width in enumerate(widths if len(widths) > 1 else widths * len(axes)):
            if any(width):
                flow.freeze(axes[k], reasons.NOT_A_CHANNEL_AXIS, call.path)
                axes[k] = None
        return [axes]
