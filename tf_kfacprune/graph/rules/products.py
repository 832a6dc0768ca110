"""Channel rules for products of two tensors, `einsum` and `matmul`: attention written by hand.

An axis that both operands have and the result has not is summed over: its channels are coupled,
and the product reads them. A channel that is zero in one operand adds nothing, so the gate stands
on the first. An axis of both operands and the result couples its channels; any other passes. Where
one operand is a weight of the layer itself, the product is a contraction like that of `Dense`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops, tree

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import Extent, Removal, extents
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import register_internal_rule

__all__: list[str] = []

# Letters of the axes of the operands and of the result.
Letters = tuple[str, str, str]


class ProductRule(ContractionRule):
    """Base of the rules for products, whose axes have letters as in `einsum`."""

    def letters(self, call: Call) -> Letters | None:
        """The letters of the operands' and the result's axes, or None if it is another product."""
        raise NotImplementedError

    def operands(self, call: Call) -> tuple[Any, Any] | None:
        """The two tensors, or None if there are not two of them."""
        both = [leaf for leaf in call.args if isinstance(leaf, Value)]
        return (both[0], both[1]) if len(both) == 2 == len(call.args) else None

    def read_axes(self, call: Call) -> Mapping[Value, set[int]]:
        known, letters = self.operands(call), self.letters(call)
        if known is None or letters is None:
            return {}
        first, second, made = letters
        summed = (set(first) & set(second)) - set(made)
        return {known[0]: {first.index(letter) for letter in summed}}

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        known, letters = self.operands(call), self.letters(call)
        if known is None or letters is None or known[0] is known[1]:
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
        if known is None or letters is None:
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


@register_internal_rule("Einsum")
class EinsumRule(ProductRule):
    """`keras.ops.einsum` of two tensors: axes summed over are read, shared ones are coupled."""

    def operands(self, call: Call) -> tuple[Any, Any] | None:
        both = call.inputs
        return (both[0], both[1]) if len(both) == 2 else None

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
