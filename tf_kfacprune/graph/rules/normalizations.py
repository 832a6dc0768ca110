r"""Channel rules for normalization with statistics across channels.

They become exact by taking statistics over the channels that are present only (p_c = 1), so that
the compact layer with C' of C channels computes the same:

    mu' = sum_c p_c x_c / C',    sigma'^2 = sum_c p_c (x_c - mu')^2 / C'

No formula of Keras is repeated for that. An ordinary layer fed with `x~_c = r x_c` where a channel
is present, `r mu'` elsewhere, and `r = sqrt(C / C')`, finds the mean `r mu'` and the variance
`sigma'^2`, so it returns r times what it should; scale parameters divided by r undo that. With all
channels present r is exactly 1 and nothing changes, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from keras import layers, ops

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Count, Gates, Shape, along
from tf_kfacprune.graph.rules.registry import register_channel_rule
from tf_kfacprune.graph.rules.substitution import substituted

__all__: list[str] = []

CHANNELS = "channels"


def _axes_of(axis: Any) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


def _widened(x: Any) -> Any:
    """`x` in at least float32, in which these layers take their statistics."""
    return ops.cast(x, "float32") if x.dtype in ("float16", "bfloat16") else x


def _stretch(present: Any) -> tuple[Any, Any]:
    """The stretch r = sqrt(C / C') and its inverse, C' being at least 1."""
    left = ops.maximum(ops.sum(present), 1.0)
    size = float(present.shape[0])
    return ops.sqrt(size / left), ops.sqrt(left / size)


def _call_filled(
    layer: Any, present: Any, axis: int, positions: Sequence[int], x: Any, kwargs: dict[str, Any]
) -> Any:
    """Calls a layer that subtracts a mean with x~ for `x`, and with gamma / r.

    Args:
        layer: The layer, which has a `gamma` or multiplies by none.
        present: 1 for the channels that stay, shape `(C,)`.
        axis: The channel axis.
        positions: The other axes over which the layer takes its statistics.
        x: What the layer is called with.
        kwargs: The other arguments of the call.

    Returns:
        The output of the layer.
    """
    x = _widened(x)
    stretch, shrink = _stretch(present)
    mask = along(present, axis, x)
    means = ops.mean(x, positions, keepdims=True) if positions else x
    mean = ops.sum(means * mask, axis, keepdims=True) * ops.cast(_per_channel(present), x.dtype)
    x = ops.where(mask > 0, x, mean) * ops.cast(stretch, x.dtype)
    gamma = ops.ones_like(present) if layer.gamma is None else layer.gamma
    gamma = ops.convert_to_tensor(gamma) * ops.cast(shrink, gamma.dtype)
    with substituted(layer, scale=True, gamma=gamma):
        return layer(x, **kwargs)


def _per_channel(present: Any) -> Any:
    """1 / C', C' being at least 1."""
    return 1.0 / ops.maximum(ops.sum(present), 1.0)


class AcrossChannelsRule(ChannelRule):
    """Base of the rules for normalization over one channel axis."""

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, axes = call.operation, flow.of(call.inputs[0])
        normalized = _axes_of(layer.axis)
        if len(normalized) == 1:
            labels = flow.role(layer, CHANNELS, axes[normalized[0]], call.path)
            flow.read_inside(call, CHANNELS, labels)
        else:
            for k in normalized:
                flow.freeze(axes[k], reasons.NORMALIZED_ACROSS_CHANNELS, call.path)
        return [axes]


@register_channel_rule(layers.LayerNormalization)
class LayerNormalizationRule(AcrossChannelsRule):
    """`LayerNormalization` over one axis: statistics are of the channels that stay."""

    weights: ClassVar = {"gamma": (CHANNELS,), "beta": (CHANNELS,)}

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        present, (axis,) = gates[CHANNELS].present, _axes_of(layer.axis)
        return _call_filled(layer, present, axis, [], args[0], kwargs)


@register_channel_rule(layers.RMSNormalization)
class RMSNormalizationRule(AcrossChannelsRule):
    """`RMSNormalization` over one axis: the mean square is of the channels that stay."""

    weights: ClassVar = {"scale": (CHANNELS,)}

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        present, (axis,) = gates[CHANNELS].present, _axes_of(layer.axis)
        x = _widened(args[0])
        stretch, shrink = _stretch(present)
        x = x * along(present, axis, x) * ops.cast(stretch, x.dtype)
        scale = ops.convert_to_tensor(layer.scale)
        with substituted(layer, scale=scale * ops.cast(shrink, scale.dtype)):
            return layer(x, **kwargs)


@register_channel_rule(layers.UnitNormalization)
class UnitNormalizationRule(AcrossChannelsRule):
    """`UnitNormalization` over one axis: closed channels add nothing to the norm."""

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        (axis,) = _axes_of(layer.axis)
        return layer(args[0] * along(gates[CHANNELS].present, axis, args[0]), **kwargs)


@register_channel_rule(layers.GroupNormalization)
class GroupNormalizationRule(ChannelRule):
    """`GroupNormalization`: its groups go as a whole; if there is only one, channel by channel.

    Statistics of different groups do not mix, so a group of channels is one neuron.
    """

    weights: ClassVar = {"gamma": (CHANNELS,), "beta": (CHANNELS,)}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, axes = call.operation, flow.of(call.inputs[0])
        labels = flow.role(layer, CHANNELS, axes[layer.axis], call.path)
        for k, others in enumerate(axes):
            if k != layer.axis % len(axes):
                flow.freeze(others, reasons.NORMALIZED_ACROSS_CHANNELS, call.path)
        if layer.groups == 1:
            flow.read_inside(call, CHANNELS, labels)
        elif labels is not None:
            members = np.reshape(labels, (layer.groups, -1)).T
            for member in members[1:]:
                flow.unite(members[0], member, call.path)
            flow.role(layer, "groups", members[0], call.path)
        return [axes]

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        groups = count("groups")
        config["groups"] = layer.groups if groups is None else groups

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        rank = len(args[0].shape)
        positions = [k for k in range(1, rank) if k != layer.axis % rank]
        present = gates[CHANNELS].present
        return _call_filled(layer, present, layer.axis, positions, args[0], kwargs)
