from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_kfacprune.compaction import compact, parity_error, random_inputs
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze


def text_classifier(recurrent):
    tokens = keras.Input((9,), dtype="int32")
    x = layers.Embedding(20, 12, mask_zero=True, name="embedding")(tokens)
    x = layers.Dense(10, activation="relu")(x)
    x = recurrent(x)
    return keras.Model(tokens, layers.Dense(2)(layers.Dense(6, activation="tanh")(x)))


def attention_encoder():
    inputs = keras.Input((7, 5))
    x = layers.Dense(12, name="embed")(inputs)
    for k in range(2):
        attended = layers.MultiHeadAttention(2, 4, name=f"attention{k}")(x, x)
        x = layers.Add()([x, attended])
        y = layers.Dense(16, activation="gelu", name=f"wide{k}")(x)
        x = layers.Add()([x, layers.Dense(12, name=f"narrow{k}")(y)])
    return keras.Model(inputs, layers.Dense(3)(ops.mean(x, axis=1)))


def cross_attention():
    a, b = keras.Input((7, 5)), keras.Input((4, 6))
    query, key, value = (layers.Dense(n)(t) for n, t in ((8, a), (9, b), (10, b)))
    x = layers.MultiHeadAttention(2, 3, output_shape=11)(query, value, key=key)
    return keras.Model([a, b], layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def einsum_layers():
    inputs = keras.Input((7, 5))
    x = layers.EinsumDense("abc,cd->abd", (None, 8), bias_axes="d", activation="relu")(inputs)
    x = layers.EinsumDense("...c,cde->...de", (4, 3), bias_axes="de")(x)
    x = layers.EinsumDense("abde,ef->abdf", (None, 4, 6), bias_axes="f")(x)
    x = ops.max(layers.Dense(5, activation="relu")(x), axis=(1, 2))
    return keras.Model(inputs, layers.Dense(2)(x))


MODELS = {
    "lstm": lambda: text_classifier(layers.LSTM(8)),
    "gru": lambda: text_classifier(layers.GRU(8, reset_after=False)),
    "rnn": lambda: text_classifier(layers.SimpleRNN(8)),
    "attention": attention_encoder,
    "cross": cross_attention,
    "einsum": einsum_layers,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prune_inputs", [False, True], ids=["", "inputs"])
def test_compact_equals_gated(name, prune_inputs):
    rng = np.random.default_rng(0)
    model = MODELS[name]()
    for weight in model.weights:
        if weight.path.endswith("bias"):
            weight.assign(rng.normal(size=weight.shape))
    gated, x = insert_gates(model, prune_inputs=prune_inputs), random_inputs(model)
    assert parity_error(model(x), gated(x)) == 0
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(rng.uniform(0.2, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.6))
    small = compact(gated, verify=False)
    assert parity_error(model(x), gated(x)) > 1e-2
    assert parity_error(gated(x), small(x)) <= 5e-6
    network = GatedNetwork(gated)
    kept = network.kept_neurons()
    assert small.count_params() == network.cost.count("params", kept) < model.count_params()
    assert CostModel(analyze(small)).macs_dense == network.cost.count("macs", kept)


def test_costs_of_attention_and_recurrence_equal_the_count_by_hand():
    cost = CostModel(analyze(cross_attention()))
    dense = 7 * 5 * 8 + 4 * 6 * 9 + 4 * 6 * 10 + 11 * 3
    attention = 6 * (7 * 8 + 4 * 9 + 4 * 10 + 7 * 11)
    assert cost.macs_dense == dense + attention
    cost = CostModel(analyze(text_classifier(layers.LSTM(8))))
    assert cost.macs_dense == 9 * (12 * 10 + 10 * 32 + 8 * 32) + 8 * 6 + 6 * 2
    assert cost.params_dense == text_classifier(layers.LSTM(8)).count_params()


def test_embedding_channels_and_recurrent_units_are_prunable():
    channels = analyze(text_classifier(layers.LSTM(8, name="lstm")))
    sizes = {group.name: group.size for group in channels.groups}
    assert (sizes["embedding"], sizes["lstm"]) == (12, 8)
    assert len(channels.frozen) == 1  # the classifier


def test_the_residual_stream_of_an_attention_encoder_is_one_group():
    stream, heads = analyze(attention_encoder()).groups[:2]
    assert (heads.name, heads.size) == ("attention0:heads", 2)
    assert stream.producers == ("embed", "attention0", "narrow0", "attention1", "narrow1")
    assert stream.size == 12


def test_costs_of_models_for_any_image_size_are_stated_for_one_size():
    def convnet(size):
        return keras.Sequential(
            [
                keras.Input((size, size, 3)),
                layers.Conv2D(6, 3, strides=2, padding="same"),
                layers.Conv2D(4, 3, strides=2, padding="same"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(2),
            ]
        )

    sized, dynamic = (CostModel(analyze(convnet(size))) for size in (224, None))
    assert sized.macs_dense == dynamic.macs_dense
    assert compact(insert_gates(convnet(None))).input_shape == (None, None, None, 3)
