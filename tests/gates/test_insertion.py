from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.gates import GateBank, GatedNetwork, GateEdge, insert_gates


def chain():
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, activation="relu", name="first"),
            layers.BatchNormalization(name="bn"),
            layers.Dense(3, name="second"),
            layers.Dense(2, name="head"),
        ]
    )


def gate_layers(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def test_every_edge_that_reads_neurons_is_gated_by_one_bank():
    gated = insert_gates(chain())
    (bank,) = gate_layers(gated, GateBank)
    assert bank.name == "gates"
    assert bank.groups == (("first", 6), ("second", 3))
    assert [edge.name for edge in gate_layers(gated, GateEdge)] == ["second_gate", "head_gate"]


def test_layers_are_the_callers_own():
    model = chain()
    gated = insert_gates(model)
    for layer in model.layers:
        assert gated.get_layer(layer.name) is layer


def test_a_tensor_with_several_readers_is_gated_once():
    inputs = keras.Input((5,))
    x = layers.Dense(6)(inputs)
    model = keras.Model(inputs, [layers.Dense(3)(x), layers.Dense(2)(x)])
    assert len(gate_layers(insert_gates(model), GateEdge)) == 1


def test_masks_pass_the_gates():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(9, 5, mask_zero=True)(tokens)
    x = layers.Dense(6, activation="relu")(layers.Dense(4)(x))
    model = keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))
    gated = insert_gates(model)
    data = np.array([[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 1, 2]])
    np.testing.assert_array_equal(model(data), gated(data))
    shifted = np.array([[1, 2, 3, 0, 0, 0, 0]])
    assert not np.allclose(gated(shifted), gated(shifted + (shifted == 0)))


def test_names_already_taken_are_avoided():
    inputs = keras.Input((5,))
    x = layers.Dense(6, name="gates")(inputs)
    gated = insert_gates(keras.Model(inputs, layers.Dense(2, name="second_gate")(x)))
    assert gate_layers(gated, GateBank)[0].name == "gates_1"


def test_the_kind_of_gate_is_passed_on():
    (bank,) = gate_layers(insert_gates(chain(), kind="deterministic"), GateBank)
    assert bank.kind == "deterministic"
    with pytest.raises(InvalidArgumentError, match="kind"):
        insert_gates(chain(), kind="soft")


def test_a_model_in_which_nothing_can_be_pruned_is_refused_with_the_reasons():
    single = keras.Sequential([keras.Input((5,)), layers.Dense(2, name="only")])
    only_output = r"'only' \(2 channels\): part of a model output.* put a Dense .* layer behind"
    with pytest.raises(UnsupportedModelError, match=only_output):
        insert_gates(single)
    with pytest.raises(UnsupportedModelError, match=r"excluded by the caller.* `inspect` tells"):
        insert_gates(chain(), exclude=[".*"])


def test_a_gated_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="has gates already"):
        insert_gates(insert_gates(chain()))


def test_gated_models_can_be_saved_and_analyzed_after_loading(tmp_path):
    gated = insert_gates(chain(), prune_inputs=True)
    gated.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    network, reloaded = GatedNetwork(gated), GatedNetwork(loaded)
    assert network.channels.groups == reloaded.channels.groups
    np.testing.assert_array_equal(network.neuron_gates, reloaded.neuron_gates)


def test_training_the_gated_model_with_held_open_gates_equals_training_the_model():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 5)).astype("float32"), rng.integers(0, 2, 64)
    losses = []
    for gate in (False, True):
        keras.utils.set_random_seed(7)
        model = chain()
        model = insert_gates(model) if gate else model
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        history = model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
