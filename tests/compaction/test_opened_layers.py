"""Opened custom layers are pruned, and the compact model equals the gated one."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.graph import custom_layers as custom
from tf_kfacprune.compaction import compact, parity_error
from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.graph import analyze


def gelu_by_hand(x):
    return 0.5 * x * (1.0 + ops.tanh(0.8 * (x + 0.04 * ops.power(x, 3))))


class LayerNormByHand(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.built = True

    def call(self, x):
        centred = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
        deviation = ops.std(x, axis=-1, keepdims=True)
        return centred * ops.rsqrt(variance + 0.1) * self.scale / (1.0 + deviation)


class LinearByHand(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], self.units), name="w")
        self.b = self.add_weight(shape=(self.units,), name="b")
        self.built = True

    def call(self, x):
        return ops.matmul(x, self.w) + self.b


class Attention(layers.Layer):
    """Builds the projections of its subclasses, and the one that merges the heads."""

    def build(self, shape):
        self.out = layers.EinsumDense("bthd,hdc->btc", (None, shape[-1]), name="out")
        for layer in (self.query, self.key, self.value):
            layer.build(shape)
        self.out.build(self.query.compute_output_shape(shape))
        self.built = True


class AttentionByHand(Attention):
    """Projections by EinsumDense, rotation of nothing, products by einsum, heads merged at last."""

    def __init__(self, heads, dim, **kwargs):
        super().__init__(**kwargs)
        shape = (None, heads, dim)
        self.query = layers.EinsumDense("btc,chd->bthd", shape, bias_axes="hd", name="query")
        self.key = layers.EinsumDense("btc,chd->bthd", shape, name="key")
        self.value = layers.EinsumDense("btc,chd->bthd", shape, bias_axes="hd", name="value")
        self.softmax = layers.Softmax()

    def call(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = ops.einsum("bthd,bshd->bhts", q, k) * 0.5
        return x + self.out(ops.einsum("bhts,bshd->bthd", self.softmax(scores), v))


class WindowsByHand(layers.Layer):
    """Queries, keys and values of all heads by one Dense layer, taken apart afterwards."""

    def __init__(self, heads, dim, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.dim = heads, dim
        self.qkv = layers.Dense(3 * heads * dim, name="qkv")

    def build(self, shape):
        self.out = layers.Dense(shape[-1], name="out")
        self.qkv.build(shape)
        self.out.build((*shape[:-1], self.heads * self.dim))
        self.built = True

    def call(self, x):
        batch, length = ops.shape(x)[0], x.shape[1]
        qkv = ops.reshape(self.qkv(x), (batch, length, 3, self.heads, self.dim))
        q, k, v = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)), axis=0)
        scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))), axis=-1)
        y = ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3))
        return x + self.out(ops.reshape(y, (batch, length, self.heads * self.dim)))


class GroupedAttention(Attention):
    """`dot_product_attention` of four query heads with two key heads."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = layers.EinsumDense("btc,chd->bthd", (None, 4, 3), name="query")
        self.key = layers.EinsumDense("btc,chd->bthd", (None, 2, 3), name="key")
        self.value = layers.EinsumDense("btc,chd->bthd", (None, 2, 3), name="value")

    def call(self, x):
        y = ops.dot_product_attention(self.query(x), self.key(x), self.value(x), is_causal=True)
        return x + self.out(y)


class MergesPatches(layers.Layer):
    """Every second position, side by side, with a new axis on the way."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.reduce = layers.Dense(4, name="reduce")

    def build(self, shape):
        self.reduce.build((*shape[:-1], 2 * shape[-1]))
        self.built = True

    def call(self, x):
        pairs = ops.concatenate([x[:, :-1:2], x[:, 1::2]], axis=-1)
        return self.reduce(pairs[:, None])[:, 0]


class Interleaved(layers.Layer):
    """Every second channel gates the one before it; then copies of all."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.both = layers.Dense(10, name="both")
        self.out = layers.Dense(6, name="out")

    def build(self, shape):
        self.both.build(shape)
        self.out.build((*shape[:-1], 10))
        self.built = True

    def call(self, x):
        y = self.both(x)
        y = ops.tile(y[..., ::2] * ops.sigmoid(y[..., 1::2]), (1, 1, 2))
        return x + self.out(y)


class PicksAndNormalizes(layers.Layer):
    """The position with the largest sum, in unit length, beside the last one by its norm."""

    def call(self, x):
        where = ops.argmax(ops.sum(ops.stop_gradient(x), axis=-1), axis=-1)
        picked = ops.take_along_axis(x, where[:, None, None], axis=1)[:, 0]
        last = x[:, -1] / (0.1 + ops.norm(x[:, -1], axis=-1, keepdims=True))
        return ops.normalize(picked, axis=-1) + last


class ReadsAnothersWeight(layers.Layer):
    """An operation reads a weight of a layer inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = custom.Scale(name="inner")

    def build(self, shape):
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        return ops.multiply(self.inner(x), self.inner.gamma)


class LearnedTokens(layers.Layer):
    """A class token and an embedding of positions, called on constants."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def build(self, shape):
        self.table = layers.Embedding(self.length + 1, shape[-1], name="table")
        self.table.build()
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")
        self.built = True

    def call(self, x):
        token = ops.tile(self.token, (ops.shape(x)[0], 1, 1))
        return ops.concatenate([token, x], axis=1) + self.table(np.arange(self.length + 1)[None])


def sequence_model(*made):
    inputs = keras.Input((5, 3))
    x = layers.Dense(6, name="stem")(inputs)
    for layer in made:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def blocks():
    return sequence_model(custom.Block(5, name="block1"), custom.Block(4, name="block2"))


def custom_activation():
    return sequence_model(custom.FeedForward(7, activation=gelu_by_hand, name="ffn"))


def normalized_by_hand():
    return sequence_model(LayerNormByHand(name="norm"), custom.FeedForward(5, name="ffn"))


def linear_by_hand():
    return sequence_model(LinearByHand(5, name="first"), layers.ReLU(), LinearByHand(4, name="x"))


def attention_by_hand():
    return sequence_model(AttentionByHand(3, 4, name="attention"))


def learned_tokens():
    return sequence_model(LearnedTokens(5, name="tokens"), custom.FeedForward(5, name="ffn"))


def windows_by_hand():
    return sequence_model(WindowsByHand(3, 2, name="attention"))


def grouped_attention():
    return sequence_model(GroupedAttention(name="attention"))


def merges_patches():
    return sequence_model(custom.FeedForward(5, name="ffn"), MergesPatches(name="merge"))


def interleaved():
    return sequence_model(Interleaved(name="glu"))


def picks_and_normalizes():
    return sequence_model(custom.FeedForward(5, name="ffn"), PicksAndNormalizes(name="pick"))


def reads_anothers_weight():
    return sequence_model(ReadsAnothersWeight(name="reader"))


def units_as_image():
    inputs = keras.Input((3,))
    x = layers.Reshape((2, 2, 4))(layers.Dense(16, activation="relu", name="units")(inputs))
    x = layers.Conv2DTranspose(3, 3, strides=2, padding="same", name="up")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def sizes():
    inputs = keras.Input((None, 3))
    x = custom.SizeOfData(name="sized")(layers.Dense(8, name="stem")(inputs))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


@pytest.mark.parametrize(
    ("build", "prunable"),
    [
        (blocks, {"stem": 6, "block1/ffn/dense": 5, "block2/ffn/dense": 4}),
        (custom_activation, {"stem": 6, "ffn/dense": 7}),
        (normalized_by_hand, {"stem": 6, "ffn/dense": 5}),
        (linear_by_hand, {"stem": 6, "first/w": 5, "x/w": 4}),
        (
            attention_by_hand,
            {"stem": 6, "attention/query": 4, "attention/query:2": 3, "attention/value": 4},
        ),
        (learned_tokens, {"stem": 6, "ffn/dense": 5}),
        (windows_by_hand, {"stem": 6, "attention/qkv": 3}),
        (grouped_attention, {"stem": 6, "attention/query": 3, "attention/query:2": 2}),
        (merges_patches, {"stem": 6, "ffn/dense": 5, "merge/reduce": 4}),
        (interleaved, {"stem": 6, "glu/both": 5}),
        (picks_and_normalizes, {"stem": 6, "ffn/dense": 5}),
        (reads_anothers_weight, {"stem": 6}),
        (units_as_image, {"units": 4, "up": 3}),
        (sizes, {"stem": 8, "sized/table": 2}),
    ],
)
def test_compact_equals_gated(build, prunable, assert_exact):
    model = build()
    channels = analyze(model)
    found = {group.name: group.size for group in channels.groups}
    assert {name: found.get(name) for name in prunable} == prunable
    assert_exact(model)


def tied_embedding():
    tokens = keras.Input((5,), dtype="int32")
    embedding = layers.ReversibleEmbedding(9, 6, name="tokens")
    x = custom.FeedForward(5, name="ffn")(embedding(tokens))
    return keras.Model(tokens, embedding(x, reverse=True))


def test_tied_embeddings_lose_channels(assert_exact):
    model = tied_embedding()
    (stream,) = (g for g in analyze(model).groups if g.name == "tokens")
    assert stream.size == 6
    assert stream.producers == ("tokens", "ffn/dense_out")
    assert stream.consumers == ("ffn/dense", "tokens")
    assert_exact(model, data=np.arange(15).reshape(3, 5).astype("int32") % 9)


def test_an_opened_gated_network_comes_back_from_a_file(tmp_path, assert_exact):
    gated = assert_exact(blocks())
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(np.arange(bank.size) % 3 > 0)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.saving.load_model(tmp_path / "gated.keras")
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")
    assert parity_error(gated(x), loaded(x)) == 0
    small = compact(loaded)
    assert parity_error(gated(x), small(x)) <= 1e-5
    small.save(tmp_path / "small.keras")
    assert parity_error(small(x), keras.saving.load_model(tmp_path / "small.keras")(x)) == 0


def test_weights_of_the_gated_network_are_the_users_own():
    from tf_kfacprune.gates import insert_gates

    model = blocks()
    before = model.get_layer("block1").scale.gamma
    gated = insert_gates(model)
    assert any(weight is before for weight in gated.trainable_weights)
    ours = {id(weight) for weight in gated.weights}
    assert all(id(weight) in ours for weight in model.weights)
