"""Random transformers written by hand: what is opened, gated and compacted computes the same."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

from tf_kfacprune.compaction import compact, parity_error
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze, opaque_layers, trace_opened

LENGTH, WIDTH = 5, 6


@dataclass(frozen=True)
class Plan:
    """How a block is written.

    Attributes:
        projections: How queries, keys and values are made.
        heads: Number of query heads.
        shared: How many query heads share a head of keys and values.
        pairs: Half the number of dimensions of a head.
        rotation: How queries and keys are rotated, if they are.
        scores: How scores are computed.
        mask: How positions are masked, if they are.
        norm: How the input is normalized.
        feed_forward: How the second half is written.
        scale: A factor given as keyword argument, or None.
    """

    projections: str
    heads: int
    shared: int
    pairs: int
    rotation: str
    scores: str
    mask: str
    norm: str
    feed_forward: str
    scale: float | None


PLANS = st.builds(
    Plan,
    st.sampled_from(["fused", "split", "apart", "einsum", "matmul"]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from(["none", "halves", "interleaved", "table"]),
    st.sampled_from(["einsum", "matmul", "operation"]),
    st.sampled_from(["none", "causal", "where"]),
    st.sampled_from(["layer", "rms", "by hand", "none"]),
    st.sampled_from(["gelu", "gated", "fused gate"]),
    st.sampled_from([None, 0.5]),
)


def rotated(x, how):
    """Queries or keys `(batch, length, heads, dims)`, rotated by their positions."""
    dims = x.shape[-1]
    frequencies = 100.0 ** -(np.arange(0, dims, 2, dtype="float32") / dims)
    if how == "table":
        angles = np.outer(np.arange(LENGTH), np.tile(frequencies, 2)).astype("float32")
        cos, sin = (np.asarray(f(angles))[:, None] for f in (np.cos, np.sin))
    else:
        positions = ops.arange(ops.shape(x)[1], dtype="float32")
        angles = positions[:, None] * ops.convert_to_tensor(frequencies)[None]
        if how == "halves":
            angles = ops.concatenate([angles, angles], axis=-1)
        cos, sin = ops.cos(angles)[:, None], ops.sin(angles)[:, None]
    if how == "interleaved":
        even, odd = x[..., ::2], x[..., 1::2]
        turned = ops.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        return ops.reshape(turned, ops.shape(x))
    first, second = ops.split(x, 2, axis=-1)
    return x * cos + ops.concatenate([-second, first], axis=-1) * sin


class Attention(layers.Layer):
    def __init__(self, plan, **kwargs):
        super().__init__(**kwargs)
        self.plan = plan
        self.dims, self.queries = 2 * plan.pairs, plan.heads * plan.shared
        fused = (self.queries + 2 * plan.heads) * self.dims
        if plan.projections in ("fused", "split"):
            self.qkv = layers.Dense(fused, name="qkv")
        elif plan.projections == "apart":
            self.parts = [layers.Dense(n * self.dims, name=name) for name, n in self._heads()]
        elif plan.projections == "einsum":
            self.parts = [
                layers.EinsumDense("btc,chd->bthd", (None, n, self.dims), bias_axes="hd", name=name)
                for name, n in self._heads()
            ]
        self.out = layers.Dense(WIDTH, name="out")

    def _heads(self):
        return [("query", self.queries), ("key", self.plan.heads), ("value", self.plan.heads)]

    def build(self, shape):
        if self.plan.projections in ("fused", "split"):
            self.qkv.build(shape)
        elif self.plan.projections == "matmul":
            self.kernels = [
                self.add_weight((shape[-1], n * self.dims), name=name) for name, n in self._heads()
            ]
        else:
            for part in self.parts:
                part.build(shape)
        self.out.build((*shape[:-1], self.queries * self.dims))
        self.built = True

    def project(self, x):
        shape = (*ops.shape(x)[:2], -1, self.dims)
        kind = self.plan.projections
        if kind == "fused" and self.plan.shared == 1:
            shape = (*ops.shape(x)[:2], 3, self.plan.heads, self.dims)
            qkv = ops.reshape(self.qkv(x), shape)
            return [qkv[:, :, k] for k in range(3)]
        if kind in ("fused", "split"):
            ends = [self.queries * self.dims, (self.queries + self.plan.heads) * self.dims]
            return [ops.reshape(y, shape) for y in ops.split(self.qkv(x), ends, axis=-1)]
        if kind == "apart":
            return [ops.reshape(part(x), shape) for part in self.parts]
        if kind == "matmul":
            return [ops.reshape(x @ kernel, shape) for kernel in self.kernels]
        return [part(x) for part in self.parts]

    def call(self, x, scale=1.0):
        plan = self.plan
        query, key, value = self.project(x)
        if plan.rotation != "none":
            query, key = rotated(query, plan.rotation), rotated(key, plan.rotation)
        if plan.shared > 1 and (plan.scores != "operation" or plan.heads == 1):
            key, value = (ops.repeat(y, plan.shared, axis=2) for y in (key, value))
        if plan.scores == "operation":  # which repeats several heads, not a single one
            y = ops.dot_product_attention(query, key, value, is_causal=plan.mask == "causal")
        else:
            y = self.attend(query, key, value)
        y = ops.reshape(y, (*ops.shape(x)[:2], self.queries * self.dims))
        return scale * self.out(y)

    def attend(self, query, key, value):
        by_einsum = self.plan.scores == "einsum"
        if by_einsum:
            scores = ops.einsum("bqhd,bkhd->bhqk", query, key)
        else:
            query, key, value = (ops.transpose(y, (0, 2, 1, 3)) for y in (query, key, value))
            scores = query @ ops.swapaxes(key, -1, -2)
        scores = scores / float(np.sqrt(self.dims))
        past = np.tril(np.ones((LENGTH, LENGTH), bool))
        if self.plan.mask == "where":
            scores = ops.where(past, scores, -1e9)
        elif self.plan.mask == "causal":
            scores = scores + np.where(past, 0.0, -1e9).astype("float32")
        scores = ops.softmax(scores, axis=-1)
        if by_einsum:
            return ops.einsum("bhqk,bkhd->bqhd", scores, value)
        return ops.transpose(scores @ value, (0, 2, 1, 3))


class FeedForward(layers.Layer):
    def __init__(self, plan, **kwargs):
        super().__init__(**kwargs)
        self.kind, units = plan.feed_forward, 2 * plan.pairs + 1
        self.up = layers.Dense(units * (1 + (self.kind == "fused gate")), name="up")
        self.gate = layers.Dense(units, activation="silu", name="gate")
        self.down = layers.Dense(WIDTH, name="down")
        self.units = units

    def build(self, shape):
        self.up.build(shape)
        if self.kind == "gated":
            self.gate.build(shape)
        self.down.build((*shape[:-1], self.units))
        self.built = True

    def call(self, x):
        y = self.up(x)
        if self.kind == "gelu":
            return self.down(ops.gelu(y))
        if self.kind == "gated":
            return self.down(y * self.gate(x))
        gate, y = ops.split(y, 2, axis=-1)
        return self.down(ops.silu(gate) * y)


class ByHand(layers.Layer):
    """Layer normalization by hand."""

    def build(self, shape):
        self.gamma = self.add_weight(shape[-1:], initializer="ones", name="gamma")
        self.built = True

    def call(self, x):
        x = x - ops.mean(x, axis=-1, keepdims=True)
        return self.gamma * x / ops.sqrt(ops.var(x, axis=-1, keepdims=True) + 0.1)


def norm(kind, name):
    return {
        "layer": lambda: layers.LayerNormalization(epsilon=0.1, name=name),
        "rms": lambda: layers.RMSNormalization(epsilon=0.1, name=name),
        "by hand": lambda: ByHand(name=name),
        "none": lambda: layers.Identity(name=name),
    }[kind]()


class Block(layers.Layer):
    def __init__(self, plan, **kwargs):
        super().__init__(**kwargs)
        self.scale = plan.scale
        self.parts = [
            (norm(plan.norm, "before"), Attention(plan, name="attention")),
            (norm(plan.norm, "between"), FeedForward(plan, name="ffn")),
        ]

    def build(self, shape):
        for layer in (layer for pair in self.parts for layer in pair):
            layer.build(shape)
        self.built = True

    def call(self, x):
        (before, attention), (between, ffn) = self.parts
        given = {} if self.scale is None else {"scale": self.scale}
        x = x + attention(before(x), **given)
        return x + ffn(between(x))


def transformer(plans, times, is_tied, is_sized):
    """Tokens, blocks, logits; the last block is called as often as told."""
    is_sized |= any(p.rotation == "table" or p.mask != "none" for p in plans)
    tokens = keras.Input((LENGTH if is_sized else None,), dtype="int32", name="tokens")
    table = layers.ReversibleEmbedding(9, WIDTH, name="table")
    x = table(tokens)
    blocks = [Block(plan, name=f"block{k}") for k, plan in enumerate(plans)]
    for block in [*blocks, *blocks[-1:] * (times - 1)]:
        x = block(x)
    x = layers.LayerNormalization(epsilon=0.1, name="last")(x)
    return keras.Model(tokens, table(x, reverse=True) if is_tied else layers.Dense(3)(x))


@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    plans=st.lists(PLANS, min_size=1, max_size=2),
    times=st.integers(1, 2),
    is_tied=st.booleans(),
    is_sized=st.booleans(),
    seed=st.integers(0, 99),
)
def test_compact_equals_gated(plans, times, is_tied, is_sized, seed):
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = transformer(plans, times, is_tied, is_sized)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape) * 0.4)
    data = rng.integers(0, 9, (3, LENGTH)).astype("int32")
    graph = trace_opened(model)
    assert opaque_layers(graph) == []
    # An activation in one operation or in several: the last bit depends on the processor.
    assert parity_error(model(data), graph.run(data)) < 1e-6
    gated = insert_gates(model)
    assert parity_error(model(data), gated(data)) < 1e-6
    (bank,) = GatedNetwork(gated).sources
    soft = rng.uniform(0.3, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.7)
    for values in (np.ceil(soft), soft):
        bank.set_values(values)
        small = compact(gated, verify=False)
        assert parity_error(gated(data), small(data)) <= 1e-5
        network = GatedNetwork(gated)
        kept = network.kept_neurons()
        assert small.count_params() == network.cost.count("params", kept)
        assert CostModel(analyze(small)).macs_dense == network.cost.count("macs", kept)
