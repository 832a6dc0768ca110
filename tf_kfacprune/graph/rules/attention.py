"""Channel rules for attention: whole heads go, and dimensions of the keys and values of all heads.

Query q, key k and value v of a head h attend by `softmax(q k^T / sqrt(D)) v`. A closed head is
cut off where the output projection reads it, and so is a value dimension d. A closed key dimension
takes no part in the products of queries and keys if the query is zero there. Where D' of D key
dimensions stay, a layer divides by sqrt(D'), so its query projection is multiplied by sqrt(D' / D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np
from keras import layers, ops

from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.labels import Axes, LabelFlow
from tf_kfacprune.graph.rules.base import ChannelRule, Count, Extent, Gates, Roles, Shape, extents
from tf_kfacprune.graph.rules.contractions import ContractionRule
from tf_kfacprune.graph.rules.registry import register_channel_rule
from tf_kfacprune.graph.rules.substitution import substituted

__all__: list[str] = []

QUERY, KEY, VALUE = "_query_dense", "_key_dense", "_value_dense"
GATE, OUTPUT = "_gate_dense", "_output_dense"


class HeadsRule(ContractionRule):
    """Base of the rules for layers with several heads and projections of their own.

    Roles are `"query"`, `"key"` and `"value"` (channels that are read), `"heads"`, `"kv_heads"`,
    `"key_dim"`, `"value_dim"` and `"out"`.
    """

    folded: ClassVar = {
        f"{QUERY}.kernel": ("query", "key_dim"),
        f"{QUERY}.bias": ("key_dim",),
        f"{KEY}.kernel": ("key",),
        f"{VALUE}.kernel": ("value",),
        f"{GATE}.kernel": ("query",),
        f"{OUTPUT}.kernel": ("heads", "value_dim"),
    }
    kv_heads: ClassVar[str] = "heads"

    def weight_roles(self, layer: Any) -> Roles:
        rank = len(getattr(layer, OUTPUT).kernel.shape)
        out = ("out",) if rank == 3 else (None,) * (rank - 2)
        axes: dict[str, tuple[Sequence[str | None], Sequence[str | None]]] = {
            QUERY: (("query",), ("heads", "key_dim")),
            KEY: (("key",), (self.kv_heads, "key_dim")),
            VALUE: (("value",), (self.kv_heads, "value_dim")),
            GATE: (("query",), ("heads", "value_dim")),
            OUTPUT: (("heads", "value_dim"), out),
        }
        roles: dict[str, Sequence[str | None]] = {}
        for name, (read, made) in axes.items():
            dense = getattr(layer, name, None)  # the gate is optional
            if dense is not None:
                roles[f"{name}.kernel"] = (*read, *made)
                if dense.bias is not None:
                    roles[f"{name}.bias"] = made
        return roles

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

    def create(self, call: Call, flow: LabelFlow) -> None:
        """Makes the labels of the heads and their dimensions, and says that they are read."""
        raise NotImplementedError

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        layer, operands = call.operation, self.operands(call)
        if not all(map(self.has_plain_weights, self._projections(layer))):
            return self.freeze_all(call, flow, reasons.WEIGHTS_NOT_PLAIN)
        for value in call.inputs:
            others = flow.of(value)[:-1] if value in operands.values() else flow.of(value)
            for labels in others:
                flow.freeze(labels, reasons.NOT_A_CHANNEL_AXIS, call.path)
        for role, value in operands.items():
            labels = flow.read(call, value, len(value.shape) - 1, role)
            flow.role(layer, role, labels, call.path)
        self.create(call, flow)
        axes: list[Axes] = [[None] * len(value.shape) for value in call.outputs]
        kernel = getattr(layer, OUTPUT).kernel
        if len(kernel.shape) == 3:
            axes[0][-1] = flow.created(call, "out", kernel.shape[-1])
        heads = flow.roles(layer)["heads"]
        if len(axes) > 1 and len(operands["query"].shape) == 3:
            axes[1][1] = heads
        elif len(axes) > 1:  # Keras does not say where in the scores the heads are
            flow.freeze(heads, reasons.MIXED_AXES, call.path)
        return axes

    def _projections(self, layer: Any) -> list[Any]:
        found = (getattr(layer, name, None) for name in (QUERY, KEY, VALUE, GATE, OUTPUT))
        return [dense for dense in found if dense is not None]

    def rescale(self, layer: Any, name: str, weight: np.ndarray, count: Count) -> np.ndarray:
        left, size = count("key_dim"), getattr(layer, QUERY).kernel.shape[-1]
        if left is None or left == size or not name.startswith(QUERY):
            return weight
        return weight * np.asarray(math.sqrt(left / size), weight.dtype)

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        query, output = getattr(layer, QUERY), getattr(layer, OUTPUT)
        project, merge = query.call, output.call

        def gated(x: Any, *roles: tuple[str, int]) -> Any:
            for role, axis in roles:
                if role in gates:  # else it cannot be pruned
                    shape = [-1, *[1] * (-1 - axis)]
                    x = x * ops.cast(ops.reshape(gates[role].z, shape), x.dtype)
            return x

        with ExitStack() as stack:
            first = substituted(query, call=lambda x, **k: gated(project(x, **k), ("key_dim", -1)))
            last = substituted(
                output, call=lambda x, **k: merge(gated(x, ("heads", -2), ("value_dim", -1)), **k)
            )
            stack.enter_context(first)
            stack.enter_context(last)
            return layer(*args, **kwargs)

    def macs(self, call: Call, flow: LabelFlow) -> Sequence[Sequence[Extent]]:
        operands = self.operands(call)
        read = {QUERY: "query", KEY: "key", VALUE: "value", GATE: "query", OUTPUT: "query"}
        products: list[Sequence[Extent]] = []
        for name, operand in read.items():
            value = operands[operand]
            if getattr(call.operation, name, None) is not None:
                steps = extents(value, flow, range(1, len(value.shape) - 1))
                products.append([*steps, *self.role_extents(call, flow, f"{name}.kernel")])
        return products


@register_channel_rule(layers.MultiHeadAttention)
class MultiHeadAttentionRule(HeadsRule):
    """`MultiHeadAttention`: each head of its own; key and value dimensions of all heads."""

    sizes: ClassVar = {"num_heads": "heads", "key_dim": "key_dim", "value_dim": "value_dim"}

    def create(self, call: Call, flow: LabelFlow) -> None:
        layer = call.operation
        sizes = {"heads": layer.num_heads, "key_dim": layer.key_dim, "value_dim": layer.value_dim}
        for role, size in sizes.items():
            flow.read_inside(call, role, flow.created(call, role, size, part=role))

    def edit_config(self, layer: Any, config: dict[str, Any], count: Count, shape: Shape) -> None:
        super().edit_config(layer, config, count, shape)
        # Left to itself the layer makes as many outputs as the query has channels.
        if count("out") is not None:
            config["output_shape"] = (count("out"),)


@register_channel_rule(layers.GroupQueryAttention)
class GroupQueryAttentionRule(HeadsRule):
    """`GroupQueryAttention`: a key and value head goes with all query heads that share it.

    If all query heads share one, each goes by itself. Keys and values have the same dimensions,
    and the output has those of the query.
    """

    sizes: ClassVar = {
        "num_query_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "key_dim",
    }
    kv_heads: ClassVar = "kv_heads"

    def create(self, call: Call, flow: LabelFlow) -> None:
        layer = call.operation
        if layer.num_key_value_heads == 1:
            flow.created(call, "heads", layer.num_query_heads, part="heads")
        else:
            shared = flow.created(call, "kv_heads", layer.num_key_value_heads, part="heads")
            flow.role(layer, "heads", np.repeat(shared, layer.num_repeats), call.path)
        dimensions = flow.created(call, "key_dim", layer.head_dim, part="head_dim")
        flow.role(layer, "value_dim", dimensions, call.path)
        read = flow.roles(layer)
        for role in ("heads", "key_dim", "value_dim"):
            flow.read_inside(call, role, read[role])
        out = flow.created(call, "out", layer.feature_dim)
        flow.unite(out, flow.unite(read["query"], read["value"], call.path), call.path)


class ScoresRule(ChannelRule):
    """Base of the rules for attention without projections: `[query, value]` or also a key.

    Channels of query and key are coupled and read by the scores; those of the value pass.
    """

    def reads_exactly(self, layer: Any) -> bool:
        """Whether single channels can be taken out of the scores."""
        raise NotImplementedError

    def propagate(self, call: Call, flow: LabelFlow) -> Sequence[Axes]:
        query, value, *key = call.inputs
        for operand in call.inputs:
            for labels in flow.of(operand)[:-1]:
                flow.freeze(labels, reasons.NOT_A_CHANNEL_AXIS, call.path)
        compared = flow.of(query)[-1], flow.of(key[0] if key else value)[-1]
        if self.reads_exactly(call.operation):
            dimensions = flow.unite(*compared, where=call.path)
            dimensions = flow.role(call.operation, "dim", dimensions, call.path)
            flow.read_inside(call, "dim", dimensions)
        else:
            for labels in compared:
                flow.freeze(labels, reasons.REDUCED, call.path)
        axes: list[Axes] = [[None] * len(output.shape) for output in call.outputs]
        axes[0][-1] = flow.of(value)[-1]
        return axes


@register_channel_rule(layers.Attention)
class AttentionRule(ScoresRule):
    """`Attention`: channels that are not present are zero in the products of query and key."""

    def reads_exactly(self, layer: Any) -> bool:
        return layer.score_mode == "dot"

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        compare = layer._calculate_scores

        def gated(query: Any, key: Any) -> Any:
            return compare(query * ops.cast(gates["dim"].present, query.dtype), key)

        with substituted(layer, _calculate_scores=gated):
            return layer(*args, **kwargs)


@register_channel_rule(layers.AdditiveAttention)
class AdditiveAttentionRule(ScoresRule):
    """`AdditiveAttention`: its scores are a sum over channels, weighted by `scale`."""

    weights: ClassVar = {"scale": ("dim",)}
    folded: ClassVar = {"scale": "dim"}

    def reads_exactly(self, layer: Any) -> bool:
        return layer.use_scale  # else all channels count alike, even if their sum is a constant

    def call_gated(self, layer: Any, gates: Gates, args: Any, kwargs: Any) -> Any:
        scale = ops.convert_to_tensor(layer.scale)
        scale = ops.cast(scale * ops.cast(gates["dim"].z, scale.dtype), layer.compute_dtype)
        with substituted(layer, scale=scale):
            return layer(*args, **kwargs)
