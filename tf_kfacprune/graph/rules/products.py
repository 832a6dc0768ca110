"""Channel rules for products of two tensors, `einsum` and `matmul`: attention written by hand.

An axis that both operands have and the result has not is summed over: its channels are coupled,
and the product reads them. A channel that is zero in one operand adds nothing, so the gate stands
on the first. An axis of both operands and the result couples its channels; any other passes. Where
one operand is a weight of the layer itself, the product is a contraction like that of `Dense`; an
array constant loses the entries of the channels that go.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import layers, ops, tree

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import (
    Extent,
    Gates,
    Removal,
    along,
    cut_constant,
    extents,
    follow_constant,
)
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import register_channel_rule, register_internal_rule

__all__: list[str] = []

# Letters of the axes of the operands and of the result.
Letters = tuple[str, str, str]


class ProductRule(ContractionRule):
    """Base of the rules for products, whose axes have letters as in `einsum`."""

    def letters(self, call: Call) -> Letters | None:
        """The letters of the operands' and the result's axes, or None if it is another product."""
        raise NotImplementedError

    def operands(self, call: Call) -> tuple[Any, Any] | None:
        """The two tensors, of which one may be a constant, or None if there are not two of them."""
        both = [leaf for leaf in call.args if hasattr(leaf, "shape")]
        return (both[0], both[1]) if len(both) == 2 == len(call.args) else None

    def again(self, call: Call, args: Any) -> Any:
        """The product of other operands."""
        raise NotImplementedError

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        known, letters = self.operands(call), self.letters(call)
        if known is None or letters is None:
            return {}
        first, second, made = letters
        summed = (set(first) & set(second)) - set(made)
        read = {first.index(letter) for letter in summed}
        return {known[0]: read} if all(isinstance(value, Value) for value in known) else {}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        known, letters = self.operands(call), self.letters(call)
        if known is None or letters is None:
            return self.freeze_all(call, flow, reasons.UNKNOWN_OPERATION)
        if not all(isinstance(value, Value) for value in known):
            return self._with_constant(call, flow, known, letters)
        if known[0] is known[1] and not _is_square(letters):
            return self.freeze_all(call, flow, reasons.UNKNOWN_OPERATION)
        first, second, made = letters
        self._produce(call, flow, known, letters)
        axes: dict[str, Any] = {}
        for k, letter in enumerate(first):
            labels, shared = flow.of(known[0])[k], letter in second
            if shared:
                other = flow.of(known[1])[second.index(letter)]
                if letter in made:
                    labels = self._coupled(call, flow, known, letter, letters)
                elif known[0] is known[1]:  # one gate may not stand on both
                    flow.read_statistic(call, known[0], k, "sum")
                elif labels is not None and other is not None:
                    flow.read(call, known[0], k, letter)
                    flow.unite(flow.base(labels), flow.base(other), call.path)
                else:
                    flow.unite(labels, other, call.path)
            elif letter not in made:
                flow.freeze(labels, reasons.REDUCED, call.path)
            axes[letter] = labels
        for k, letter in enumerate(second):
            if letter not in first:
                axes[letter] = flow.of(known[1])[k]
                if letter not in made:
                    flow.freeze(axes[letter], reasons.REDUCED, call.path)
        return [[axes[letter] for letter in made]]

    def _with_constant(
        self, call: Call, flow: LabelFlow, known: tuple[Any, Any], letters: Letters
    ) -> Sequence[Axes]:
        """A product with an array constant: axes that are summed over are frozen, others pass."""
        number = 0 if isinstance(known[0], Value) else 1
        value, constant = known[number], known[1 - number]
        own, other, made = letters[number], letters[1 - number], letters[2]
        axes: dict[str, Any] = dict(zip(own, flow.of(value), strict=True))
        for k, letter in enumerate(own):
            if letter not in made:
                flow.freeze(axes[letter], reasons.REDUCED, call.path)
            elif value.shape[k] == 1:
                flow.freeze(axes[letter], reasons.BROADCAST, call.path)
                axes[letter] = None
        for k, letter in enumerate(other):
            if letter in made and letter not in own:
                axes[letter] = follow_constant(constant, k - len(other), call, flow, letter)
        return [[axes[letter] for letter in made]]

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        known, letters = self.operands(call), self.letters(call)
        if known is None or letters is None or all(isinstance(value, Value) for value in known):
            return NotImplemented
        number = 1 if isinstance(known[0], Value) else 0
        made, operands = letters[2], list(args)
        operands[number] = cut_constant(
            known[number],
            {
                k: removal.kept(call.outputs[0], made.index(letter))
                for k, letter in enumerate(letters[number])
                if letter in made
            },
        )
        if operands[number] is known[number]:
            return NotImplemented
        return self.again(call, operands)

    def _coupled(
        self, call: Call, flow: LabelFlow, known: tuple[Value, Value], letter: str, letters: Letters
    ) -> Any:
        """The labels of an axis that both operands and the result have."""
        places = [letters[n].index(letter) for n in (0, 1)]
        labels = [flow.of(value)[k] for value, k in zip(known, places, strict=True)]
        sizes = [value.shape[k] for value, k in zip(known, places, strict=True)]
        if sizes[0] != sizes[1] and 1 in sizes:  # broadcast
            single = sizes.index(1)
            flow.freeze(labels[single], reasons.BROADCAST, call.path)
            return labels[1 - single]
        return flow.unite(labels[0], labels[1], call.path)

    def _produce(
        self, call: Call, flow: LabelFlow, known: tuple[Value, Value], letters: Letters
    ) -> None:
        """If an operand is a weight, its axes that are not summed over make new channels."""
        for number, value in enumerate(known):
            for k, letter in enumerate(letters[number]):
                if value in flow.own_weights and letter not in letters[1 - number]:
                    flow.produce(flow.own_weights[value], flow.of(value)[k])

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        known, letters = self.operands(call), self.letters(call)
        if known is None or letters is None or not all(isinstance(v, Value) for v in known):
            return []
        # As everywhere, products of data with data (scores of attention) are not counted.
        fixed = [None not in value.shape for value in known]
        if all(fixed):  # a batch of fixed size
            fixed = [value in flow.own_weights for value in known]
        if fixed[0] == fixed[1]:
            return []
        data, weight = (1, 0) if fixed[0] else (0, 1)
        places = [k for k, x in enumerate(letters[data]) if x not in letters[weight] and k > 0]
        kernel = extents(known[weight], flow, range(len(known[weight].shape)))
        return [[*extents(known[data], flow, places), *kernel]]


def _is_square(letters: Letters) -> bool:
    """Whether a product of a tensor with itself takes every axis that is in both for the same."""
    first, second, _ = letters
    return all(first.index(x) == second.index(x) for x in first if x in second)


@register_internal_rule("Einsum")
class EinsumRule(ProductRule):
    """`keras.ops.einsum` of two tensors: axes summed over are read, shared ones are coupled."""

    def again(self, call: Call, args: Any) -> Any:
        return ops.einsum(call.operation.subscripts, *args)

    def letters(self, call: Call) -> Letters | None:
        equation = getattr(call.operation, "subscripts", "").replace(" ", "")
        match = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation)
        if match is None:
            return None
        first, second, made = match.groups()
        distinct = all(len(set(part)) == len(part) for part in (first, second, made))
        return (first, second, made) if distinct else None


@register_internal_rule("Matmul")
class MatmulRule(ProductRule):
    """`keras.ops.matmul`, `x @ y`: the last axis of the one with the last but one of the other."""

    def letters(self, call: Call) -> Letters | None:
        known = self.operands(call)
        ranks = [] if known is None else [len(value.shape) for value in known]
        if not ranks or min(ranks) < 2 or (ranks[0] != ranks[1] and ranks[1] != 2):
            return None
        batch = "abcdefgh"[: ranks[0] - 2]
        shared = batch if ranks[1] == ranks[0] else ""
        return f"{batch}mk", f"{shared}kn", f"{batch}mn"

    def again(self, call: Call, args: Any) -> Any:
        return ops.matmul(*args)


@register_internal_rule("Outer")
class OuterRule(ProductRule):
    """`keras.ops.outer` of two vectors: the channels of both pass."""

    def letters(self, call: Call) -> Letters | None:
        known = self.operands(call)
        is_known = known is not None and all(len(value.shape) == 1 for value in known)
        return ("m", "n", "mn") if is_known else None

    def again(self, call: Call, args: Any) -> Any:
        return ops.outer(*args)


@register_channel_rule(layers.Dot)
class DotRule(ProductRule):
    """`Dot`: the channels that it sums over are coupled and read, the others pass.

    Normalized, it reads them inside: those that are present make up the norms.
    """

    def operands(self, call: Call) -> tuple[Any, Any] | None:
        both = call.inputs
        return (both[0], both[1]) if len(both) == 2 else None

    def letters(self, call: Call) -> Letters | None:
        known = self.operands(call)
        if known is None:
            return None
        ranks = [len(value.shape) for value in known]
        axes = _summed_axes(call.operation, ranks)
        first = string.ascii_lowercase[: ranks[0]]
        second = list(string.ascii_uppercase[: ranks[1]])
        second[0], second[axes[1]] = first[0], first[axes[0]]
        rest = [x for x in (*first, *second[1:]) if x != first[axes[0]]]
        return first, "".join(second), "".join(rest)

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        rank, known, letters = len(call.outputs[0].shape), self.operands(call), self.letters(call)
        if not call.operation.normalize or known is None or letters is None:
            (axes,) = super().propagate(call, flow)
            return [[*axes, *[None] * (rank - len(axes))]]  # two vectors make one of one entry
        first, second, made = letters
        (summed,) = set(first[1:]) & set(second[1:])
        passed = dict(zip(second, flow.of(known[1]), strict=True))
        other = passed[summed]
        passed |= dict(zip(first, flow.of(known[0]), strict=True))
        labels = flow.unite(passed[summed], other, call.path)
        flow.read_inside(call, "dim", flow.role(call.operation, "dim", labels, call.path))
        axes = [passed[letter] for letter in made]
        return [[*axes, *[None] * (rank - len(axes))]]

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        axes = _summed_axes(layer, [len(x.shape) for x in args[0]])
        present = gates["dim"].present
        both = [x * along(present, axis, x) for x, axis in zip(args[0], axes, strict=True)]
        return layer(both, **kwargs)


def _summed_axes(layer: layers.Dot, ranks: Sequence[int]) -> list[int]:
    """The axes of its two operands over which a `Dot` layer sums."""
    axes = (layer.axes, layer.axes) if isinstance(layer.axes, int) else layer.axes
    return [axis % rank for axis, rank in zip(axes, ranks, strict=True)]


@register_internal_rule("DotProductAttention")
class DotProductAttentionRule(ContractionRule):
    """`keras.ops.dot_product_attention`: a head with its keys; a dimension of all that have it.

    The scores are sums over the dimensions of the heads, scaled by their number at first. Keras
    takes values for as long as queries, so a dimension goes from queries, keys and values.
    """

    def tensors(self, call: Call) -> list[Value]:
        """Query, key and value of a call."""
        named = [call.kwargs[name] for name in ("query", "key", "value") if name in call.kwargs]
        return [leaf for leaf in (*call.args[:3], *named) if isinstance(leaf, Value)]

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        return {self.tensors(call)[0]: {3}}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        tensors = self.tensors(call)
        heads = [value.shape[2] or 0 for value in tensors if len(value.shape) == 4]
        if len(heads) != 3 or not all(heads) or heads[0] % heads[1] or heads[1] != heads[2]:
            return self.freeze_all(call, flow, reasons.UNKNOWN_OPERATION)
        for value in tensors:
            for k in (0, 1):
                flow.freeze(flow.of(value)[k], reasons.NOT_A_CHANNEL_AXIS, call.path)
        return [[None, None, self._heads(call, flow, tensors), self._dimensions(call, flow)]]

    def _heads(self, call: Call, flow: LabelFlow, tensors: Sequence[Value]) -> Any:
        query, key, values = (flow.of(value)[2] for value in tensors)
        shared = flow.unite(key, values, call.path)
        if shared is not None:
            shared = np.repeat(shared, (tensors[0].shape[2] or 0) // (tensors[1].shape[2] or 1))
        queries = flow.unite(query, shared, call.path)
        given = [x for x in tree.flatten((call.args, call.kwargs)) if hasattr(x, "shape")]
        for extra in given:  # a mask or a bias, which may have one entry per head
            if any(extra is tensor for tensor in tensors):
                continue
            if isinstance(extra, Value):
                flow.freeze_value(extra, reasons.UNTRACKED_OPERAND, call.path)
            if len(extra.shape) > 2 and extra.shape[-3] != 1:
                flow.freeze(queries, reasons.UNTRACKED_OPERAND, call.path)
        return queries

    def _dimensions(self, call: Call, flow: LabelFlow) -> Any:
        query, key, value = self.tensors(call)
        queries, keys, values = (flow.of(tensor)[3] for tensor in (query, key, value))
        if queries is None or keys is None or values is None or query is key:
            for labels in (queries, keys, values):
                flow.freeze(labels, reasons.UNTRACKED_OPERAND, call.path)
            return None
        flow.read(call, query, 3, "dimensions")
        flow.unite(flow.base(queries), flow.base(keys), call.path)
        return flow.unite(values, flow.base(queries), call.path)

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        return []  # as everywhere, products of data with data are not counted

    def replay(self, call: Call, args: Any, kwargs: Any, removal: Removal) -> Any:
        names = ("query", "key", "value", "bias", "mask", "scale")
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("scale") is None:
            given["scale"] = (self.tensors(call)[0].shape[3] or 1) ** -0.5
        heads = given["query"].shape[2]
        if given["key"].shape[2] == 1 < heads:  # Keras repeats several heads, not a single one
            repeated = {name: ops.repeat(given[name], heads, axis=2) for name in ("key", "value")}
            given |= repeated
        options = ("is_causal", "flash_attention", "attn_logits_soft_cap")
        settings = {name: getattr(call.operation, name) for name in options}
        return ops.dot_product_attention(**given, **settings)
