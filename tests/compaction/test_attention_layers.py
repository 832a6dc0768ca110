from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.keras_features import needs_argument
from tf_kfacprune.compaction import compact, parity_error, random_inputs
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze, reasons


def encoder(make, features=12):
    """Self-attention in a residual stream with normalization."""
    inputs = keras.Input((7, 5))
    x = layers.Dense(features, name="embed")(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, make()(y, y)])
    return keras.Model(inputs, layers.Dense(3)(ops.mean(layers.LayerNormalization()(x), axis=1)))


ATTENTION = {
    "multi-head": lambda: layers.MultiHeadAttention(3, 4),
    "no bias, values": lambda: layers.MultiHeadAttention(2, 4, value_dim=6, use_bias=False),
    "scores and dropout": lambda: layers.MultiHeadAttention(3, 4, dropout=0.2, output_shape=12),
    "gate": lambda: layers.MultiHeadAttention(3, 4, use_gate=True),
    "one head": lambda: layers.MultiHeadAttention(1, 6),
    "grouped": lambda: layers.GroupQueryAttention(4, 6, 3),
    "grouped, gate": lambda: layers.GroupQueryAttention(4, 4, 2, use_gate=True, use_bias=False),
    "one key head": lambda: layers.GroupQueryAttention(4, 3, 1),
}


GATED = needs_argument(layers.MultiHeadAttention, "use_gate")


@pytest.mark.parametrize(
    "attention",
    [pytest.param(name, marks=GATED) if "gate" in name else name for name in ATTENTION],
)
def test_compact_equals_gated(attention, assert_exact):
    assert_exact(encoder(ATTENTION[attention]))


def test_everything_but_the_classifier_is_prunable():
    channels = analyze(encoder(lambda: layers.MultiHeadAttention(3, 4, value_dim=5, name=None)))
    assert len(channels.frozen) == 1
    sizes = [(group.name.split(":")[-1], group.size) for group in channels.groups]
    heads = [("heads", 3), ("key_dim", 4), ("value_dim", 5)]
    assert sizes == [("embed", 12), *heads, *heads]


def test_query_heads_go_with_the_key_head_they_share():
    channels = analyze(encoder(lambda: layers.GroupQueryAttention(4, 6, 3)))
    edge = next(edge for edge in channels.edges if edge.role == "heads")
    assert (edge.neurons - edge.neurons[0]).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("self_attention", [True, False], ids=["self", "cross"])
def test_compact_equals_gated_with_masks(self_attention, assert_exact):
    tokens, others = keras.Input((7,), dtype="int32"), keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(11, 12, mask_zero=True)
    x = embedding(tokens)
    y = x if self_attention else layers.Dense(9)(embedding(others))
    attention = layers.MultiHeadAttention(3, 4)
    x = layers.Add()([x, attention(x, y, use_causal_mask=self_attention)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    inputs = tokens if self_attention else [tokens, others]
    model = keras.Model(inputs, layers.Dense(3)(x))
    rng = np.random.default_rng(0)
    data = [rng.integers(1, 11, (6, n)) * (np.arange(n) < n - 2) for n in (7, 5)]
    assert_exact(model, data=data[0] if self_attention else data)


def test_compact_equals_gated_with_an_attention_mask_and_a_key(assert_exact):
    a, b = keras.Input((7, 5)), keras.Input((4, 6))
    mask = keras.Input((7, 4), dtype="bool", name="attention_mask")
    query, key, value = (layers.Dense(n)(t) for n, t in ((8, a), (9, b), (10, b)))
    x = layers.MultiHeadAttention(2, 3, value_dim=5, output_shape=11)(
        query, value, key=key, attention_mask=mask
    )
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model([a, b, mask], layers.Dense(3)(x))
    assert_exact(model)


def test_attention_over_an_image_axis(assert_exact):
    inputs = keras.Input((4, 5, 3))
    x = layers.Dense(8)(inputs)
    x = layers.MultiHeadAttention(3, 4, attention_axes=(2,))(x, x)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    assert_exact(model)


def test_heads_stay_where_their_scores_are_an_output(assert_exact):
    inputs = keras.Input((7, 5))
    x = layers.Dense(8)(inputs)
    attention = layers.MultiHeadAttention(3, 4, name="attention")
    x, scores = attention(x, x, return_attention_scores=True)
    model = keras.Model(inputs, [layers.Dense(2)(layers.GlobalAveragePooling1D()(x)), scores])
    frozen = {f.layer: f.reason for f in analyze(model).frozen}
    assert frozen["attention:heads"] == reasons.MODEL_OUTPUT
    assert "attention:key_dim" not in frozen
    assert_exact(model)


def test_scores_scale_with_the_key_dimensions_that_stay():
    """One closed key dimension: the compact layer divides by a smaller root."""
    model = encoder(lambda: layers.MultiHeadAttention(2, 4, name=None))
    gated = insert_gates(model)
    network = GatedNetwork(gated)
    (bank,) = network.sources
    values = np.ones(bank.size)
    closed = next(g for g in network.channels.groups if g.name.endswith("key_dim"))
    values[closed.start] = 0
    bank.set_values(values)
    small, x = compact(gated), random_inputs(model)
    assert parity_error(gated(x), small(x)) <= 1e-6
    assert {layer.key_dim for layer in small.layers if hasattr(layer, "key_dim")} == {3, 4}


def test_macs_of_heads_and_dimensions_are_counted_by_hand():
    cost = CostModel(analyze(encoder(lambda: layers.MultiHeadAttention(3, 4, value_dim=5))))
    openness = np.ones(cost.channels.num_neurons)
    for group in cost.channels.groups:  # 2 heads, 3 key and 4 value dimensions left
        openness[group.start] = group.name == "embed"
    attention = 7 * 12 * 2 * (3 + 3 + 4 + 4)
    assert cost.count("macs", openness) == 7 * 5 * 12 + 2 * attention + 12 * 3


def scored(layer, value_size=8):
    inputs = keras.Input((7, 5))
    query, key = layers.Dense(8, name="query")(inputs), layers.Dense(8, name="key")(inputs)
    value = layers.Dense(value_size, name="value")(inputs)
    x = layers.GlobalAveragePooling1D()(layer([query, value, key]))
    return keras.Model(inputs, layers.Dense(2)(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Attention(),
        lambda: layers.Attention(use_scale=True),
        lambda: layers.AdditiveAttention(),
    ],
    ids=["dot", "scaled", "additive"],
)
def test_attention_without_projections(make, assert_exact):
    model = scored(make())
    assert [group.producers for group in analyze(model).groups] == [("query", "key"), ("value",)]
    assert_exact(model)


def test_dot_product_self_attention_respects_masks(assert_exact):
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Dense(9)(layers.Embedding(11, 12, mask_zero=True)(tokens))
    x = layers.Attention()([x, x])
    model = keras.Model(tokens, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    rng = np.random.default_rng(0)
    assert_exact(model, data=rng.integers(1, 11, (6, 7)) * (np.arange(7) < 5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Attention(score_mode="concat"),
        lambda: layers.AdditiveAttention(use_scale=False),
    ],
    ids=["concat", "additive"],
)
def test_sums_without_weights_freeze_query_and_key_with_the_reason(make):
    frozen = {f.layer: f.reason for f in analyze(scored(make())).frozen}
    assert frozen["query"] == frozen["key"] == reasons.REDUCED
    assert "value" not in frozen


def test_mixed_precision_is_unchanged_by_open_gates():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = encoder(lambda: layers.MultiHeadAttention(3, 4))
    finally:
        keras.config.set_dtype_policy(previous)
    data = random_inputs(model)
    assert parity_error(model(data), insert_gates(model)(data)) == 0
