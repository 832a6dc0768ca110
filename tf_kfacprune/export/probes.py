"""Small models of one layer with fewer channels, to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, tree

from tf_kfacprune.graph import Call, ChannelGraph, ContractionRule, Value, rule_for
from tf_kfacprune.graph.latency import has_tied_channels, latency_channels
from tf_kfacprune.graph.rules.activations import ActivationRule, SoftmaxRule
from tf_kfacprune.graph.rules.channelwise import SpatialRule
from tf_kfacprune.graph.rules.merging import ConcatenateRule, MergeRule

__all__ = ["FIXED", "Channels", "LayerProbes"]

# Channels read and created by a probe: tied channels are created only, and fixed ones neither.
Channels = tuple[int, int]
FIXED = (0, 0)

# Kernels work on tiles of 8, 16 or 32 channels, and some are faster where rows of channels are
# aligned. So times are taken at multiples of 8 (of 16 above 32), at one channel less, which is no
# longer aligned, and at one channel more, where the next tile begins. What is read counts one by
# one, or in eights.
_EDGES = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128)
_READ = (1, 2, 4, 8, 9, 16, 17, 24, 25, 32, 33, 48, 64, 96, 128)
_WITHOUT_WEIGHTS = (1, 16, 64)
# Both at these shares of the channels, to tell products from sums.
_SHARES = (0.5, 0.25, 0.125)

# Layers that can be built with fewer channels by their configuration and input alone.
_CONTRACTIONS = (
    *(layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D),
    *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
    *(layers.SeparableConv1D, layers.SeparableConv2D),
    *(layers.DepthwiseConv1D, layers.DepthwiseConv2D),
)
_CHANNELWISE = (ActivationRule, SoftmaxRule, SpatialRule, MergeRule, ConcatenateRule)


@dataclass(frozen=True)
class LayerProbes:
    """How a layer is built with fewer channels.

    Attributes:
        call: A call of the layer in the model.
        dense: Its channels there: read and created; 0 and the common ones if they are tied;
            `FIXED` if it can only be built as it is.
        axes: The axis of channels of each input.
    """

    call: Call
    dense: Channels
    axes: dict[Value, int]

    @classmethod
    def of(cls, call: Call, channels: ChannelGraph) -> LayerProbes:
        """The probes of a call of a layer."""
        layer, rule, flow = call.operation, rule_for(call.operation), channels.flow
        if isinstance(rule, ContractionRule):
            is_tied = has_tied_channels(call)
            if type(layer) not in _CONTRACTIONS or (
                getattr(layer, "groups", 1) > 1 and not is_tied
            ):
                return cls(call, FIXED, {})
            read, created = (_count(extent) for extent in latency_channels(call, flow))
            axes = {call.inputs[0]: rule.channel_axis(call)}
            return cls(call, (0, created) if is_tied else (read, created), axes)
        values = (*call.inputs, call.outputs[0])
        tracked = [[k for k, axis in enumerate(flow.axes[v]) if axis is not None] for v in values]
        if not isinstance(rule, _CHANNELWISE) or any(len(axes) != 1 for axes in tracked):
            return cls(call, FIXED, {})
        dense = (0, _count(latency_channels(call, flow)[1]))
        return cls(call, dense, {v: axes[0] for v, axes in zip(call.inputs, tracked, strict=False)})

    def channels(self) -> list[Channels]:
        """All channels that the layer is to be timed with, the dense ones first."""
        read, created = self.dense
        if self.dense == FIXED:
            return [FIXED]
        if not read:
            is_plain = not isinstance(rule_for(self.call.operation), ContractionRule)
            sizes = _below(created, _WITHOUT_WEIGHTS) if is_plain else _around_edges(created)
            return [(0, size) for size in (created, *sizes)]
        reads, creates = _below(read, _READ), _around_edges(created)
        if created == 1:
            reads = reads[1:]
        corners = [
            (_nearest(share * read, reads), _nearest(share * created, creates))
            for share in _SHARES
            if reads and creates
        ]
        return list(
            dict.fromkeys(
                [
                    *((read, size) for size in (created, *creates)),
                    *((size, created) for size in reads),
                    *corners,
                    (1, 1),
                ]
            )
        )

    def build(self, channels: Channels) -> tuple[list[Any], Any]:
        """Inputs and output of a new layer like this one, with so many channels."""
        layer, rule = self.call.operation, rule_for(self.call.operation)
        config = layer.get_config()
        config.pop("name", None)  # many like it stand in one model
        shapes = {value: list(value.shape[1:]) for value in self.call.inputs}
        read, created = channels
        for value, axis in self.axes.items():
            whole = value.shape[axis] or 1
            share = created / self.dense[1] if not read else read / whole
            shapes[value][axis - 1] = max(1, round(share * whole))
        if isinstance(rule, ContractionRule) and channels != FIXED:
            counts = {"in": read, "out": created}
            if not read:
                created_by_all = self.call.outputs[0].shape[rule.channel_axis(self.call)] or 1
                counts = {"in": created, "out": created * created_by_all // self.dense[1]}
            rule.edit_config(layer, config, counts.get, ())
        inputs = {v: keras.Input(shape, dtype=v.dtype) for v, shape in shapes.items()}

        def fill(leaf: Any) -> Any:
            return inputs.get(leaf) if isinstance(leaf, Value) else leaf

        call = self.call
        args, kwargs = tree.map_structure(fill, (call.args, call.without_gates(call.kwargs)))
        outputs = type(layer).from_config(config)(*args, **kwargs)
        return list(inputs.values()), tree.flatten(outputs)[0]


def _below(most: int, grid: Sequence[int]) -> list[int]:
    """The sizes of a grid, continued in proportion, that are smaller."""
    sizes = list(grid)
    while sizes[-1] < most:
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return [size for size in sizes if size < most]


def _around_edges(most: int) -> list[int]:
    """Smaller sizes, from 2, around the edges of tiles and beside the largest one."""
    edges = _below(most, _EDGES)
    sizes = {2, most - 1, *(edge + step for edge in edges for step in (-1, 0, 1))}
    return sorted(size for size in sizes if 2 <= size < most)


def _nearest(size: float, grid: Sequence[int]) -> int:
    return int(min(grid, key=lambda known: abs(np.log(known / size))))


def _count(extent: Any) -> int:
    return len(extent) if isinstance(extent, np.ndarray) else int(extent)
