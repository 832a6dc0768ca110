"""Channel rule for einsum layers."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from keras import layers

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.activations import freeze_by_activation
from tf_kfacprune.graph.rules.base import Count, Extent, Roles, Shape, extents
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import register_channel_rule

__all__: list[str] = []


@register_channel_rule(layers.EinsumDense)
class EinsumDenseRule(ContractionRule):
    """`EinsumDense`: reads the axes that it contracts, creates the kernel's other axes.

    Roles are the letters of the equation, after `"in_"` for axes that are read.
    """

    def folded_roles(self, name: str) -> tuple[str, ...]:
        return tuple(f"in_{letter}" for letter in string.ascii_letters) if name == "kernel" else ()

    def letters(self, layer: Any) -> tuple[str, str, str] | None:
        """Input, kernel and output letters, or None if the equation is not one of the kind."""
        match = re.fullmatch(r"(?:\.\.\.)?(\w+),(\w+)->(?:\.\.\.)?(\w+)", layer.equation)
        if match is None:
            return None
        read, kernel, made = match.groups()
        contracted = [letter for letter in read if letter in kernel]
        created = [letter for letter in made if letter in kernel]
        distinct = all(len(set(part)) == len(part) for part in (read, kernel, made))
        plain = bool(contracted) and not set(contracted) & set(made) and distinct
        return (read, kernel, made) if plain and created else None

    def contracted(self, call: Call) -> dict[str, int]:
        """The axes of the input that are contracted, by letter."""
        letters = self.letters(call.operation)
        if letters is None:
            return {}
        read, kernel, _ = letters
        first = len(call.inputs[0].shape) - len(read)
        return {letter: first + k for k, letter in enumerate(read) if letter in kernel}

    def channel_axis(self, call: Call) -> int:
        return next(iter(self.contracted(call).values()), -1)

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        return {call.inputs[0]: set(self.contracted(call).values())}

    def weight_roles(self, layer: Any) -> Roles:
        letters = self.letters(layer)
        if letters is None:
            return {}
        read, kernel, made = letters
        roles: dict[str, Sequence[str | None]] = {
            "kernel": [f"in_{letter}" if letter in read else letter for letter in kernel]
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
        if letters is None:
            return self.freeze_all(call, flow, reasons.UNKNOWN_OPERATION)
        if not self.has_plain_weights(layer):
            (frozen,) = self.freeze_all(call, flow, reasons.WEIGHTS_NOT_PLAIN)
            if letters[2][-1] in letters[1]:
                labels = flow.created(call, letters[2][-1], call.outputs[0].shape[-1] or 1)
                flow.freeze(labels, reasons.WEIGHTS_NOT_PLAIN, call.path)
                frozen[-1] = labels
            return [frozen]
        read, kernel, made = letters
        for letter, axis in self.contracted(call).items():
            role = f"in_{letter}"
            flow.role(layer, role, flow.read(call, value, axis, role), call.path)
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

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        letters = self.letters(layer)
        if letters is None:
            return
        target = list(layer.partial_output_shape)
        for k, letter in enumerate(reversed(letters[2][-len(target) :]), start=1):
            # Channels that pass may be fewer, too, and be said as a number.
            left = count(letter) if letter in letters[1] else shape[-k]
            if left is not None and target[-k] is not None:
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
