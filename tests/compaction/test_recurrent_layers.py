from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune.compaction import parity_error, random_inputs
from tf_kfacprune.gates import insert_gates
from tf_kfacprune.graph import CostModel, analyze, reasons

LAYERS = {
    "simple": lambda **k: layers.SimpleRNN(8, **k),
    "lstm": lambda **k: layers.LSTM(8, **k),
    "lstm, no bias": lambda **k: layers.LSTM(8, use_bias=False, implementation=1, **k),
    "gru": lambda **k: layers.GRU(8, **k),
    "gru, reset before": lambda **k: layers.GRU(8, reset_after=False, **k),
    "gru, implementation 1": lambda **k: layers.GRU(8, implementation=1, **k),
    "cell": lambda **k: layers.RNN(layers.LSTMCell(8), **k),
    "bidirectional": lambda **k: layers.Bidirectional(layers.LSTM(8, **k)),
    "bidirectional cell": lambda **k: layers.Bidirectional(layers.RNN(layers.GRUCell(8), **k)),
}


def text_classifier(recurrent, mask_zero=True):
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(20, 12, mask_zero=mask_zero)(tokens)
    x = recurrent(layers.Dense(10, activation="relu", name="features")(x))
    x = layers.GlobalAveragePooling1D()(x) if len(x.shape) == 3 else x
    return keras.Model(tokens, layers.Dense(2, name="head")(x))


def sentences():
    return np.random.default_rng(1).integers(1, 20, (6, 5)) * (np.arange(5) < 4)


@pytest.mark.parametrize("layer", LAYERS)
def test_compact_equals_gated(layer, assert_exact):
    model = text_classifier(LAYERS[layer]())
    assert [f.layer for f in analyze(model).frozen] == ["head"]
    assert_exact(model, data=sentences())


@pytest.mark.parametrize("layer", ["lstm", "bidirectional"])
def test_compact_equals_gated_without_masks(layer, assert_exact):
    assert_exact(text_classifier(LAYERS[layer](), mask_zero=False), data=sentences())


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["simple", "lstm", "gru, reset before", "bidirectional"])
@pytest.mark.parametrize(
    "options",
    [{"return_sequences": True, "go_backwards": True}, {"unroll": True, "activation": "relu"}],
    ids=["backwards", "unrolled"],
)
def test_compact_equals_gated_with_options(layer, options, assert_exact):
    if layer == "bidirectional":
        options = {key: value for key, value in options.items() if key != "go_backwards"}
    assert_exact(text_classifier(LAYERS[layer](**options)), data=sentences(), tolerance=2e-5)


MODES = ["concat", "mul", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sum", "ave", None))]


@pytest.mark.parametrize("mode", MODES)
def test_compact_equals_gated_in_every_merge_mode(mode, assert_exact):
    inputs = keras.Input((6, 5))
    made = layers.Bidirectional(layers.GRU(6, return_state=True), merge_mode=mode)(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.Concatenate()(made)))
    channels = analyze(model)
    assert [group.size for group in channels.groups] == [6]
    assert_exact(model)


def test_encoder_and_decoder_share_their_units_through_the_states(assert_exact):
    source, target = keras.Input((6, 5)), keras.Input((4, 3))
    _, *states = layers.LSTM(8, return_state=True, name="encoder")(source)
    decoder = layers.LSTM(8, return_sequences=True, return_state=True, name="decoder")
    x, hidden, _ = decoder(target, initial_state=states)
    heads = [layers.Dense(3)(x), layers.Dense(2)(hidden)]
    model = keras.Model([source, target], heads)
    assert [group.producers for group in analyze(model).groups] == [("encoder", "decoder")]
    assert_exact(model)


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sequences", [False, True], ids=["last", "sequences"])
def test_compact_equals_gated_for_convolutional_cells(rank, sequences, assert_exact):
    inputs = keras.Input((4, *[5] * rank, 3))
    layer = getattr(layers, f"ConvLSTM{rank}D")(
        6, 3, strides=2, padding="same", return_sequences=sequences
    )
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layer(inputs))))
    assert [group.size for group in analyze(model).groups] == [6]
    assert_exact(model)


def test_a_shared_recurrent_layer_couples_its_calls(assert_exact):
    a, b = keras.Input((6, 5)), keras.Input((4, 5))
    lstm = layers.LSTM(8)
    x = layers.Concatenate()([lstm(layers.Dense(7)(a)), lstm(layers.Dense(7)(b))])
    model = keras.Model([a, b], layers.Dense(2)(x))
    assert [group.size for group in analyze(model).groups] == [7, 8]
    assert_exact(model)


def test_units_are_costed_on_both_sides_of_the_recurrent_kernel():
    cost = CostModel(analyze(text_classifier(layers.LSTM(8, name="lstm"))))
    openness = np.ones(cost.channels.num_neurons)
    (lstm,) = [group for group in cost.channels.groups if group.name == "lstm"]
    openness[lstm.start + 2 : lstm.start + lstm.size] = 0  # 2 of 8 units left
    sizes = 12 * 10 + 10 * (4 * 2) + 2 * (4 * 2)
    assert cost.count("macs", openness) == 5 * sizes + 2 * 2


FROZEN = {
    "stateful": (lambda: layers.LSTM(8, stateful=True), reasons.KEPT_STATE),
    "softmax": (lambda: layers.GRU(8, activation="softmax"), reasons.CROSS_CHANNEL_ACTIVATION),
}


@pytest.mark.parametrize("case", FROZEN)
def test_units_are_frozen_with_the_reason_where_removal_is_not_exact(case):
    make, reason = FROZEN[case]
    inputs = keras.Input(batch_shape=(4, 6, 5))
    layer = make()
    model = keras.Model(inputs, layers.Dense(2)(layer(layers.Dense(7)(inputs))))
    channels = analyze(model)
    assert {f.layer: f.reason for f in channels.frozen}[layer.name] == reason
    assert [group.size for group in channels.groups] == [7]
    x = np.random.default_rng(0).normal(size=(4, 6, 5))
    expected = model(x)
    if hasattr(layer, "reset_state") and layer.stateful:
        layer.reset_state()
    assert parity_error(expected, insert_gates(model)(x)) == 0


def test_unknown_and_stacked_cells_are_frozen_with_the_reason():
    inputs = keras.Input((6, 5))
    stacked = layers.RNN([layers.GRUCell(4), layers.GRUCell(4)])
    model = keras.Model(inputs, layers.Dense(2)(stacked(layers.Dense(7, name="dense")(inputs))))
    assert {f.reason for f in analyze(model).frozen if f.layer == "dense"} == {reasons.UNKNOWN_CELL}


def test_mixed_precision_is_unchanged_by_open_gates():
    inputs = keras.Input((6, 5))
    x = layers.LSTM(8, dtype="mixed_float16")(layers.Dense(7, dtype="mixed_float16")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(x))
    data = random_inputs(model)
    assert parity_error(model(data), insert_gates(model)(data)) == 0
