"""Channel rules for attention and the einsum layers it is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.activations import freeze_by_activation
from tf_kfacprune.graph.rules.base import (
    Extent,
    extents,
    register_channel_rule,
)
from tf_kfacprune.graph.rules.contractions import ContractionRule

__all__: list[str] = []

Roles = Mapping[str, Sequence[str | None]]


@register_channel_rule(layers.EinsumDense)
class EinsumDenseRule(ContractionRule):
    """`EinsumDense` with one contracted axis: reads it, creates the kernel's other axes.

    Roles are the letters of the equation.
    """

    folded: ClassVar = {"kernel": "in"}

    def letters(self, layer: Any) -> tuple[str, str, str] | None:
        """Input, kernel and output letters, or None if the equation is not one of the kind."""
        match = re.fullmatch(r"(?:\.\.\.)?(\w+),(\w+)->(?:\.\.\.)?(\w+)", layer.equation)
        if match is None:
            return None
        read, kernel, made = match.groups()
        contracted = [letter for letter in read if letter in kernel]
        created = [letter for letter in made if letter in kernel]
        distinct = all(len(set(part)) == len(part) for part in (read, kernel, made))
        plain = len(contracted) == 1 and not set(contracted) & set(made) and distinct
        return (read, kernel, made) if plain and created else None

    def channel_axis(self, call: Call) -> int:
        letters = self.letters(call.operation)
        if letters is None:
            return -1
        read, kernel, _ = letters
        contracted = next(letter for letter in read if letter in kernel)
        return len(call.inputs[0].shape) - len(read) + read.index(contracted)

    def weight_roles(self, layer: Any) -> Roles:
        letters = self.letters(layer)
        if letters is None:
            return {}
        read, kernel, made = letters
        roles: dict[str, Sequence[str | None]] = {
            "kernel": ["in" if letter in read else letter for letter in kernel]
        }
        if layer.bias is not None:
            aligned = made[-len(layer.bias.shape) :]
            sizes = layer.bias.shape
            roles["bias"] = [
                None if size == 1 else letter for letter, size in zip(aligned, sizes, strict=True)
            ]
        return roles

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, value = call.operation, call.inputs[0]
        letters = self.letters(layer)
        if letters is None or not self.has_plain_weights(layer):
            known = letters is not None
            reason = reasons.WEIGHTS_NOT_PLAIN if known else reasons.UNKNOWN_OPERATION
            return self.freeze_all(call, flow, reason)
        read, kernel, made = letters
        axis = self.channel_axis(call)
        flow.role(layer, "in", flow.read(call, value, axis), call.path)
        given = dict(zip(read[::-1], flow.of(value)[::-1], strict=False))
        size = dict(zip(kernel, layer.kernel.shape, strict=True))
        axes: Axes = [None] * len(call.outputs[0].shape)
        for k, letter in enumerate(reversed(made), start=1):
            created = letter in kernel
            axes[-k] = flow.created(call, letter, size[letter]) if created else given[letter]
        if len(axes) > len(made):  # axes behind the ellipsis keep their place from the left
            rest = len(axes) - len(made)
            axes[:rest] = flow.of(value)[:rest]
        return [freeze_by_activation(call, flow, axes)]

    def edit_config(
        self,
        layer: Any,
        config: dict[str, Any],
        count: Callable[[str], int | None],
        shape: tuple[int | None, ...],
    ) -> None:
        letters = self.letters(layer)
        if letters is None:
            return
        target = list(layer.partial_output_shape)
        for k, letter in enumerate(reversed(letters[2][-len(target) :]), start=1):
            left = count(letter) if letter in letters[1] else None
            if left is not None:
                target[-k] = left
        config["output_shape"] = target

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        letters = self.letters(call.operation)
        if letters is None:
            return []
        value = call.outputs[0]
        created = {k for k, letter in enumerate(reversed(letters[2]), 1) if letter in letters[1]}
        rank = len(value.shape)
        positions = [k for k in range(1, rank) if rank - k not in created]
        return [[*extents(value, flow, positions), *self.role_extents(call, flow, "kernel")]]


@register_channel_rule(layers.MultiHeadAttention)
class MultiHeadAttentionRule(ContractionRule):
    """`MultiHeadAttention` reads query, key and value and creates its output channels.

    Heads and their dimensions stay: there is no edge inside the layer where a gate could stand.
    """

    folded: ClassVar = {
        "query_dense.kernel": "query",
        "key_dense.kernel": "key",
        "value_dense.kernel": "value",
    }
    weights: ClassVar = {
        "query_dense.kernel": ("query", None, None),
        "key_dense.kernel": ("key", None, None),
        "value_dense.kernel": ("value", None, None),
        "output_dense.kernel": (None, None, "out"),
        "output_dense.bias": ("out",),
    }

    def channel_axis(self, call: Call) -> int:
        return -1

    def operands(self, call: Call) -> dict[str, Value]:
        """Query, key and value of a call."""
        given = dict(zip(("query", "value", "key"), call.args, strict=False)) | call.kwargs
        key = given.get("key")
        return {
            "query": given["query"],
            "key": given["value"] if key is None else key,
            "value": given["value"],
        }

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, operands = call.operation, self.operands(call)
        plain = [layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense]
        if not all(map(self.has_plain_weights, plain)):
            return self.freeze_all(call, flow, reasons.WEIGHTS_NOT_PLAIN)
        for value in call.inputs:
            others = flow.of(value)[:-1] if value in operands.values() else flow.of(value)
            for labels in others:
                flow.freeze(labels, reasons.NOT_A_CHANNEL_AXIS, call.path)
        for role, value in operands.items():
            labels = flow.read(call, value, len(value.shape) - 1, role)
            flow.role(layer, role, labels, call.path)
        axes: list[Axes] = [[None] * len(value.shape) for value in call.outputs]
        if len(layer.output_dense.kernel.shape) == 3:
            axes[0][-1] = flow.created(call, "out", layer.output_dense.kernel.shape[-1])
        return axes

    def edit_config(
        self,
        layer: Any,
        config: dict[str, Any],
        count: Callable[[str], int | None],
        shape: tuple[int | None, ...],
    ) -> None:
        # Left to itself the layer makes as many outputs as the query has channels.
        if count("out") is not None:
            config["output_shape"] = (count("out"),)

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        products: list[Sequence[Extent]] = []
        for role, value in self.operands(call).items():
            steps = extents(value, flow, range(1, len(value.shape) - 1))
            products.append([*steps, *self.role_extents(call, flow, f"{role}_dense.kernel")])
        query = self.operands(call)["query"]
        steps = extents(query, flow, range(1, len(query.shape) - 1))
        products.append([*steps, *self.role_extents(call, flow, "output_dense.kernel")])
        return products
