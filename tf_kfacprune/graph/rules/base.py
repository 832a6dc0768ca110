"""Channel rules: what each layer type does to channels.

A rule answers a few questions about one layer type: how labels propagate through a call, which
weight axes hold which channels, how the layer's configuration changes when channels go, how many
multiply-accumulates a call costs, and, if the layer reads channels inside, how to call it when some
of them are closed. What has no rule is frozen with a reason, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from keras import ops

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow

__all__ = [
    "ChannelRule",
    "Count",
    "Extent",
    "Gates",
    "InnerGates",
    "Removal",
    "Roles",
    "Shape",
    "along",
    "channel_axis",
    "cut_constant",
    "extents",
    "follow_constant",
    "freeze_by_constant",
    "weight_extents",
    "weight_of",
]

# One factor of a cost: a fixed number, or labels of which only the open ones count.
Extent = int | np.ndarray
# Of each weight attribute, the role of every axis; None for an axis without channels.
Roles = Mapping[str, Sequence[str | None]]
# Number of channels left in a role, or None if the role is not tracked.
Count = Callable[[str], int | None]
Shape = tuple[int | None, ...]


class Removal(Protocol):
    """What remains of the tensors of a graph once channels are gone."""

    def shape(self, value: Value) -> Shape:
        """The shape of a tensor."""

    def kept(self, value: Value, axis: int) -> np.ndarray | None:
        """The positions that stay on an axis, in order, or None if nothing goes there."""


@dataclass(frozen=True)
class InnerGates:
    """Gates of channels that a layer reads inside.

    Attributes:
        z: Their values, float32 tensor of shape `(n,)`. What is multiplied by them must be
            multiplied by a weight, too, which absorbs them when the layer is compacted.
        present: 1 for channels that stay and 0 for those that go, float32 tensor of shape `(n,)`,
            without gradient. Beside all open channels one of each group stays in any case.
    """

    z: Any
    present: Any


# The gates of each role that a layer reads inside.
Gates = Mapping[str, InnerGates]


class ChannelRule:
    """How one layer type treats channels. Subclass it and register the subclass.

    The default is the rule for an operation about which nothing is known: everything that enters
    is frozen.

    Attributes:
        weights: For each weight attribute (dotted for weights of sublayers) the role of every
            axis, None for an axis without channels. A role is a name given to labels with
            `LabelFlow.role` or `created`.
        sizes: Configuration entries that count channels: entry -> role.
        folded: If the layer is a contraction, the weights that multiply its inputs, each with the
            role of its input axis (or roles, if there are several): soft gates are folded into
            them.
        is_absent: Whether the layer does nothing in inference, so that files are without it.

    Examples:
        >>> @kp.register_channel_rule(MyScale)
        ... class MyScaleRule(kp.ChannelRule):
        ...     weights = {"gamma": ("channels",)}
        ...     def propagate(self, call, flow):
        ...         axes = flow.of(call.inputs[0])
        ...         flow.role(call.operation, "channels", axes[-1], call.path)
        ...         return [axes]

        A layer that reads channels inside, where no gate can stand, names them with
        `flow.read_inside` and says how to be called when some of them are closed:

        >>> @kp.register_channel_rule(MyMeanSubtraction)
        ... class MyMeanSubtractionRule(kp.ChannelRule):
        ...     def propagate(self, call, flow):
        ...         axes = flow.of(call.inputs[0])
        ...         flow.read_inside(call, "channels", axes[-1])
        ...         return [axes]
        ...     def call_gated(self, layer, gates, args, kwargs):
        ...         present = gates["channels"].present
        ...         mean = ops.sum(args[0] * present, -1, keepdims=True) / ops.sum(present)
        ...         return layer(ops.where(present > 0, args[0], mean))
    """

    weights: ClassVar[Roles] = {}
    sizes: ClassVar[Mapping[str, str]] = {}
    folded: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    is_absent: ClassVar[bool] = False

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        """Relates the labels of the inputs to those of the outputs.

        Args:
            call: The call.
            flow: Holds the labels; rules talk to it.

        Returns:
            For every output of the call, the labels of each of its axes.
        """
        return self.freeze_all(call, flow, reasons.UNKNOWN_OPERATION)

    def weight_roles(self, layer: Any) -> Roles:
        """The entries of `weights` that this layer has, each with a role for every axis."""
        found = {name: weight_of(layer, name) for name in self.weights}
        return {name: self.weights[name] for name, weight in found.items() if weight is not None}

    def is_homogeneous(self, call: Call) -> bool:
        """Whether f(z x) = z f(x) for every z >= 0 per channel.

        If so, a gate may stand in front of the operation as well as behind it.
        """
        del call
        return False

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        """The axes along which a gate may stand on each input: those that the call reads."""
        del call
        return {}

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        """Changes a layer's configuration in place to fewer channels.

        Args:
            layer: The layer.
            config: Its configuration.
            count: Number of channels left in a role, or None if the role is not tracked.
            shape: Shape of the layer's first output once channels are gone.
        """
        del layer, shape
        for entry, role in self.sizes.items():
            left = count(role)
            if left is not None:
                config[entry] = left

    def folded_roles(self, name: str) -> tuple[str, ...]:
        """The roles of the input axes of a weight, those along which it absorbs gates."""
        roles = self.folded.get(name, ())
        return (roles,) if isinstance(roles, str) else roles

    def fold(
        self, layer: Any, name: str, role: str, kernel: np.ndarray, scale: np.ndarray
    ) -> np.ndarray:
        """Folds gates into a weight named in `folded`: f(scale * x) = f_folded(x).

        Args:
            layer: The layer.
            name: Name of the weight.
            role: Role of the input axis.
            kernel: The weight, with all channels.
            scale: Gate values, one per input channel.

        Returns:
            The scaled weight.
        """
        axis = self.weight_roles(layer)[name].index(role)
        return kernel * scale.reshape([-1 if k == axis else 1 for k in range(kernel.ndim)])

    def rescale(self, layer: Any, name: str, weight: np.ndarray, count: Count) -> np.ndarray:
        """Corrects a weight for what the number of channels means to the layer's formula.

        Args:
            layer: The layer.
            name: Name of the weight.
            weight: What is left of it.
            count: Number of channels left in a role, or None if the role is not tracked.

        Returns:
            The corrected weight.
        """
        del layer, name, count
        return weight

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        """Calls a layer such that channels it reads inside have no effect if they are closed.

        Needed for layers whose rule uses `LabelFlow.read_inside`. With all gates at 1 the result
        must be that of `layer(*args, **kwargs)`, to the bit. Closed channels of the output may
        have any finite value: they are gated where they are read.

        Args:
            layer: The layer, with the weights of all channels.
            gates: The gates of each role that the rule reads inside.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            The outputs of the call.
        """
        raise NotImplementedError

    def why_opaque(self, layer: Any) -> str | None:
        """Why it is not seen what a layer does inside, or None if it is.

        Args:
            layer: The layer.

        Returns:
            The reason. Its operations are in no count then, and nothing of it can be pruned.
        """
        del layer
        return None

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        """Multiply-accumulates of a call: a sum of products of extents."""
        del call, flow
        return []

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        """Executes a call of a stateless operation whose arguments depend on channel counts.

        Args:
            call: The call.
            args: Positional arguments, symbolic tensors filled in.
            kwargs: Keyword arguments, likewise.
            removal: What remains of every tensor.

        Returns:
            The outputs, or NotImplemented to execute the operation as it is.
        """
        del call, args, kwargs, removal
        return NotImplemented

    def freeze_all(self, call: Call, flow: LabelFlow, reason: str) -> list[Axes]:
        """Freezes every channel that enters a call, and tracks nothing behind it."""
        for value in call.inputs:
            flow.freeze_value(value, reason, call.path)
        return [[None] * len(value.shape) for value in call.outputs]


def along(vector: Any, axis: int, like: Any) -> Any:
    """A vector shaped to be broadcast along one axis of a tensor, in the tensor's type."""
    shape = [1] * len(like.shape)
    shape[axis] = -1
    return ops.cast(ops.reshape(vector, shape), like.dtype)


def channel_axis(layer: Any, rank: int) -> int:
    """The channel axis of a layer with a `data_format`, else the last axis."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def extents(value: Value, flow: LabelFlow, axes: Sequence[int]) -> list[Extent]:
    """What the given axes of a value contribute to a cost."""
    found: list[Extent] = []
    sizes = flow.sizes(value)
    for k in axes:
        labels = flow.axes[value][k]
        found.append((sizes[k] or 1) if labels is None else flow.base(labels))
    return found


def weight_extents(
    weight: Any, axes: Sequence[str | None], layer: Any, flow: LabelFlow
) -> list[Extent]:
    """The extents of a weight's axes, given their roles."""
    named = flow.roles(layer)
    found: list[Extent] = []
    for size, role in zip(weight.shape, axes, strict=True):
        labels = None if role is None else named.get(role)
        found.append(size if labels is None else labels)
    return found


def weight_of(layer: Any, name: str) -> Any:
    """A weight by attribute name, dotted for weights of sublayers; None if there is none."""
    for attribute in name.split("."):
        layer = getattr(layer, attribute, None)
    return layer


def freeze_by_constant(constant: Any, call: Call, flow: LabelFlow, axes: Axes) -> None:
    """Freezes the axes along which a constant, aligned from the right, has several entries."""
    shape = tuple(constant.shape) if hasattr(constant, "shape") else np.shape(constant)
    for k in range(1, min(len(shape), len(axes)) + 1):
        if shape[-k] != 1:
            flow.freeze(axes[-k], reasons.ARRAY_CONSTANT, call.path)


def follow_constant(
    constant: Any, axis: int, call: Call, flow: LabelFlow, name: str
) -> np.ndarray | None:
    """Labels of an axis that an array constant alone gives to a result.

    They go if what they meet goes: tables of sines and cosines lose entries with the channels that
    they rotate. Only the last axis of a table of fractions is taken for channels, and only behind
    a layer with weights, for what is computed from inputs alone is an input feature.

    Args:
        constant: The constant.
        axis: The axis, negative.
        call: The call that reads it.
        flow: Holds the labels.
        name: What tells the axis from others of the call.

    Returns:
        The labels, or None.
    """
    size = np.shape(constant)[axis]
    is_table = axis == -1 and size > 1 and "float" in str(getattr(constant, "dtype", ""))
    if not is_table or all(value in flow.raw for value in call.inputs):
        return None
    return flow.following(call, name, size)


def cut_constant(constant: Any, positions: Mapping[int, np.ndarray | None]) -> Any:
    """An array constant without the entries of channels that are gone.

    Args:
        constant: The constant.
        positions: For some of its axes the positions that stay, or None if all do.

    Returns:
        The constant itself if nothing goes.
    """
    shape = np.shape(constant)
    for axis, kept in positions.items():
        if kept is not None and 1 != shape[axis] != len(kept):
            constant = np.take(ops.convert_to_numpy(constant), kept, axis)
    return constant
