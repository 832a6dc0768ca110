"""Rotary embeddings by hand: the two channels of a rotated pair go together, tables lose both."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_kfacprune.graph import analyze

HEADS, SHARED, DIMS, LENGTH = 4, 2, 6, 5


def frequencies(channels):
    return 1.0 / 10000.0 ** (np.arange(0, channels, 2, dtype="float32") / channels)


def angles(x, product):
    """Angles of positions and pairs, from a length that may be known only at run time."""
    positions = ops.arange(ops.shape(x)[1], dtype="float32")
    return product(positions, ops.convert_to_tensor(frequencies(x.shape[-1])))


PRODUCTS = {
    "broadcast": lambda p, f: p[:, None] * f[None],
    "einsum": lambda p, f: ops.einsum("i,j->ij", p, f),
    "outer": ops.outer,
    "matmul": lambda p, f: ops.matmul(p[:, None], f[None]),
}


def halves(x, product):
    """(x1, x2) * cos + (-x2, x1) * sin, as in Llama."""
    table = angles(x, product)
    table = ops.concatenate([table, table], axis=-1)[None, :, None]
    first, second = ops.split(x, 2, axis=-1)
    return x * ops.cos(table) + ops.concatenate([-second, first], axis=-1) * ops.sin(table)


def stacked(x, product):
    """The same, joined by a new axis and a reshape."""
    table = angles(x, product)
    table = ops.reshape(ops.stack([table, table], axis=-2), (-1, 2 * table.shape[-1]))
    table = ops.expand_dims(ops.expand_dims(table, 0), 2)
    half = x.shape[-1] // 2
    turned = ops.stack([-x[..., half:], x[..., :half]], axis=-2)
    return x * ops.cos(table) + ops.reshape(turned, ops.shape(x)) * ops.sin(table)


def interleaved(x, product):
    """Channels 2i and 2i + 1 are a pair, as in GPT-J."""
    table = angles(x, product)[None, :, None]
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], ops.cos(table), ops.sin(table)
    turned = ops.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return ops.reshape(turned, ops.shape(x))


def tables(x, product):
    """As `halves`, with tables that were made beforehand."""
    del product
    table = np.outer(np.arange(LENGTH), np.tile(frequencies(x.shape[-1]), 2))[:, None]
    cos, sin = np.cos(table).astype("float32"), np.sin(table).astype("float32")
    first, second = ops.split(x, 2, axis=-1)
    return x * cos + ops.concatenate([-second, first], axis=-1) * sin


class RotaryAttention(layers.Layer):
    """Attention with grouped queries whose queries and keys are rotated."""

    def __init__(self, rotate, product, **kwargs):
        super().__init__(**kwargs)
        self.rotate, self.product = rotate, PRODUCTS[product]
        for name, heads in (("query", HEADS), ("key", SHARED), ("value", SHARED)):
            dense = layers.EinsumDense("btc,chd->bthd", (None, heads, DIMS), name=name)
            setattr(self, name, dense)
        self.out = layers.EinsumDense("bthd,hdc->btc", (None, 8), name="out")

    def build(self, shape):
        for layer in (self.query, self.key, self.value):
            layer.build(shape)
        self.out.build((*shape[:-1], HEADS, DIMS))
        self.built = True

    def call(self, x):
        query = self.rotate(self.query(x), self.product)
        key = self.rotate(self.key(x), self.product)
        key, value = (ops.repeat(y, HEADS // SHARED, axis=2) for y in (key, self.value(x)))
        scores = ops.einsum("bqhd,bkhd->bhqk", query, key) / DIMS**0.5
        return self.out(ops.einsum("bhqk,bkhd->bqhd", ops.softmax(scores), value))


def rotary_model(rotate, product, length):
    inputs = keras.Input((length, 3))
    x = layers.Dense(8, name="stem")(inputs)
    x = x + RotaryAttention(rotate, product, name="attention")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


CASES = [
    *((halves, product, None) for product in PRODUCTS),
    (stacked, "einsum", None),
    (interleaved, "broadcast", LENGTH),
    (tables, "broadcast", LENGTH),
    *(pytest.param(interleaved, product, None, marks=pytest.mark.slow) for product in PRODUCTS),
    pytest.param(halves, "broadcast", LENGTH, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("rotate", "product", "length"), CASES)
def test_pairs_of_rotated_channels_are_pruned_exactly(rotate, product, length, assert_exact):
    model = rotary_model(rotate, product, length)
    data = np.random.default_rng(0).normal(size=(3, LENGTH, 3)).astype("float32")
    found = {group.name: group.size for group in analyze(model).groups}
    assert found["attention/key:2"] == SHARED  # heads, each with the queries that share its key
    assert found["attention/key"] == DIMS // 2  # pairs of channels
    assert found["attention/value"] == DIMS
    assert_exact(model, data=data)


def test_the_two_channels_of_a_pair_are_one_neuron():
    for rotate, distance in ((halves, DIMS // 2), (interleaved, 1)):
        channels = analyze(rotary_model(rotate, "einsum", None))
        (product, *_) = (
            edge for edge in channels.edges if "einsum" in edge.call.path.rsplit("/", 1)[-1]
        )
        neurons = product.neurons.tolist()
        pairs = [tuple(k for k in range(DIMS) if neurons[k] == n) for n in dict.fromkeys(neurons)]
        assert all(second - first == distance for first, second in pairs)
