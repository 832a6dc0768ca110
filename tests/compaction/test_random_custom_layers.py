"""Random custom layers: what is opened, gated and compacted computes what the layers compute."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

from tests.graph import custom_layers as custom
from tf_kfacprune.compaction import compact, parity_error
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import opaque_layers, trace_opened

# A block is a list of parts; a part is a kind (or a block), a width, how often it is called, the
# keyword argument of its call, and which of the layers made so far it is, if it is a shared one.
KINDS = st.sampled_from(["ffn", "scale", "gate", "dropout", "shared", "masked", "turn"])
REST = (st.integers(2, 5), st.integers(1, 2), st.sampled_from([None, 0.5]), st.integers(0, 9))
PART = st.tuples(KINDS, *REST)
NESTED = st.tuples(st.lists(PART, min_size=1, max_size=2), *REST)
BLOCK = st.lists(st.one_of(PART, NESTED), min_size=1, max_size=2)


class Gate(layers.Layer):
    """A product of two projections, one of them normalized by hand."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.left = layers.Dense(self.units, activation="silu", name="left")
        self.right = layers.Dense(self.units, name="right")
        self.down = layers.Dense(shape[-1], name="down")
        for layer in (self.left, self.right):
            layer.build(shape)
        self.down.build((*shape[:-1], self.units))
        self.built = True

    def call(self, x):
        right = self.right(x)
        right = right * ops.rsqrt(ops.mean(ops.square(right), axis=-1, keepdims=True) + 0.1)
        return self.down(self.left(x) * right)


class Block(layers.Layer):
    """Calls its parts one after another, with a factor where one is given."""

    def __init__(self, parts, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.made, self.plan = [], []
        for kind, units, times, factor, which in parts:
            if kind == "shared" and self.made:
                layer = self.made[which % len(self.made)]
            else:
                layer = make(kind, units, f"part{len(self.made)}")
                self.made.append(layer)
            self.plan.append((self.made.index(layer), times, factor))

    def build(self, shape):
        for layer in self.made:
            layer.build(shape)
        self.built = True

    def call(self, x, factor=1.0):
        for which, times, part_factor in self.plan:
            for _ in range(times):
                layer = self.made[which]
                given = part_factor is not None and isinstance(layer, Block)
                y = layer(x, factor=part_factor) if given else layer(x)
                x = x + factor * y
        return x


class Masked(layers.Layer):
    """Hands the mask of its input to a layer inside, whose size it keeps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, shape):
        self.inner = layers.GRU(shape[-1], return_sequences=True, name="inner")
        self.inner.build(shape)
        self.built = True

    def call(self, x, mask=None):
        return self.inner(x, mask=mask)


class Turn(layers.Layer):
    """Projects to pairs of channels, turns them by constants, and projects back."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = 2 * units

    def build(self, shape):
        self.up = layers.Dense(self.units, name="up")
        self.down = layers.Dense(shape[-1], name="down")
        self.up.build(shape)
        self.down.build((*shape[:-1], self.units))
        self.built = True

    def call(self, x, angle=1.0):
        x = self.up(x)
        angles = angle * np.arange(self.units // 2, dtype="float32")
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angles), np.sin(angles)
        x = ops.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
        return self.down(ops.reshape(x, (*ops.shape(x)[:2], self.units)))


def make(kind, units, name):
    if isinstance(kind, list):
        return Block(kind, name=name)
    return {
        "ffn": lambda: custom.FeedForward(units, name=name),
        "shared": lambda: custom.FeedForward(units, name=name),
        "gate": lambda: Gate(units, name=name),
        "masked": lambda: Masked(name=name),
        "turn": lambda: Turn(units, name=name),
        "scale": lambda: custom.Scale(name=name),
        "dropout": lambda: layers.Dropout(0.3, seed=1, name=name),
    }[kind]()


def to_numpy(x):
    return ops.convert_to_numpy(x)


# Masks end at layers that do not support them.
@pytest.mark.filterwarnings("ignore:.*was passed an input with a mask:UserWarning")
@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    parts=BLOCK,
    times=st.integers(1, 2),
    factor=st.sampled_from([None, 0.5]),
    is_masked=st.booleans(),
)
def test_opened_gated_and_compact_equal_the_layers(parts, times, factor, is_masked):
    inputs = keras.Input((3, 4))
    x = layers.Masking(name="masking")(inputs) if is_masked else inputs
    x, block = layers.Dense(6, activation="tanh", name="stem")(x), Block(parts, name="block")
    for _ in range(times):
        x = block(x) if factor is None else block(x, factor=factor)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape) * 0.3)
    data = rng.normal(size=(4, 3, 4)).astype("float32")
    data[0, 1:] = 0.0
    graph = trace_opened(model)
    assert not opaque_layers(graph)
    np.testing.assert_array_equal(to_numpy(graph.run(data)), to_numpy(model(data)))
    gated = insert_gates(model)
    assert parity_error(model(data), gated(data)) == 0
    (bank,) = GatedNetwork(gated).sources
    values = rng.uniform(0.3, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.7)
    bank.set_values(values)
    small = compact(gated, verify=False)
    assert parity_error(gated(data), small(data)) <= 1e-5
    network = GatedNetwork(gated)
    assert small.count_params() == network.cost.count("params", network.kept_neurons())
