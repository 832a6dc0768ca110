from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_kfacprune.compaction import compact, parity_error, random_inputs
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import GateAware, GateBank, GatedNetwork, GateEdge, insert_gates
from tf_kfacprune.graph import ChannelRule, analyze, reasons, register_channel_rule, trace


@keras.saving.register_keras_serializable(package="gate_aware_test")
class MeanSubtraction(layers.Layer):
    """A user's layer that reads its channels inside; the `shift` is an argument of the call."""

    def call(self, inputs, shift=None, training=None):
        centered = inputs - ops.mean(inputs, axis=-1, keepdims=True)
        return centered if shift is None else centered + shift


@register_channel_rule(MeanSubtraction)
class MeanSubtractionRule(ChannelRule):
    def propagate(self, call, flow):
        axes = flow.of(call.inputs[0])
        labels = flow.role(call.operation, "channels", axes[-1], call.path)
        flow.read_inside(call, "channels", labels)
        return [axes]

    def call_gated(self, layer, gates, args, kwargs):
        x, present = args[0], gates["channels"].present
        mean = ops.sum(x * present, axis=-1, keepdims=True) / ops.sum(present)
        return layer(ops.where(present > 0, x, mean), *args[1:], **kwargs)


@keras.saving.register_keras_serializable(package="gate_aware_test")
class Unfinished(layers.Layer):
    def call(self, inputs):
        return inputs


@register_channel_rule(Unfinished)
class UnfinishedRule(ChannelRule):
    def propagate(self, call, flow):
        axes = flow.of(call.inputs[0])
        flow.read_inside(call, "channels", axes[-1])
        return [axes]


def network(layer, **kwargs):
    inputs = keras.Input((5,))
    x = layer(layers.Dense(8, activation="relu", name="first")(inputs), **kwargs)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def aware(model):
    return [layer for layer in model.layers if isinstance(layer, GateAware)]


def half_closed(gated):
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(np.arange(bank.size) % 2 * 0.75)


def test_a_users_rule_makes_a_layer_of_his_own_prunable():
    model = network(MeanSubtraction(name="mean"), shift=0.25)
    gated, x = insert_gates(model), random_inputs(model)
    assert parity_error(model(x), gated(x)) == 0
    half_closed(gated)
    small = compact(gated)
    assert [layer.name for layer in small.layers[1:]] == ["first", "mean", "head"]
    assert type(small.get_layer("mean")) is MeanSubtraction
    assert small.get_layer("first").units == 4


def test_a_rule_that_reads_inside_but_does_not_say_how_to_call_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"'odd' \(Unfinished\).*UnfinishedRule.*call_g"
    ):
        insert_gates(network(Unfinished(name="odd")))


def test_the_wrapper_shares_the_layer_and_takes_its_name_and_arguments():
    norm = layers.LayerNormalization(name="norm")
    model = network(norm)
    gated = insert_gates(model)
    (wrapper,) = aware(gated)
    assert wrapper.gate_aware_of is norm
    assert wrapper.name == "norm"
    assert [v.path for v in gated.trainable_variables if v.path.startswith("norm")] == [
        v.path for v in norm.variables
    ]
    assert "training" in MeanSubtraction().call_signature_parameters
    half = GateAware(MeanSubtraction(), {"channels": [0]})
    assert half.call_signature_parameters == ["inputs", "shift", "training", "gates"]


def test_analysis_sees_through_the_wrapper():
    model = network(layers.LayerNormalization(name="norm"))
    gated = insert_gates(model)
    (call,) = [call for call in trace(gated).calls if call.path == "norm"]
    assert call.operation is model.get_layer("norm")
    assert call.runner is gated.get_layer("norm")
    assert [group.consumers for group in GatedNetwork(gated).channels.groups] == [("norm", "head")]


@pytest.mark.parametrize("wrapped", [True, False])
def test_neurons_are_prunable_only_if_every_reader_is_gated(wrapped):
    inputs = keras.Input((5,))
    gates = GateBank([("first", 8)])(inputs)
    x, norm = layers.Dense(8, name="first")(inputs), layers.LayerNormalization()
    norm.build((None, 8))
    y = GateAware(norm, {"channels": range(8)})(x, gates=list(gates)) if wrapped else norm(x)
    model = keras.Model(inputs, layers.Dense(2)(GateEdge(range(8))([y, gates[0]])))
    channels = analyze(model, gated_only=True)
    assert channels.num_neurons == (8 if wrapped else 0)
    frozen = {f.layer: f.reason for f in channels.frozen}
    assert wrapped or frozen["first"] == reasons.NOT_GATED


@pytest.mark.parametrize("layer", [MeanSubtraction, layers.LayerNormalization])
def test_gated_models_with_wrappers_save_and_load(layer, tmp_path):
    gated = insert_gates(network(layer(name="inner")))
    half_closed(gated)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.saving.load_model(tmp_path / "gated.keras")
    x = random_inputs(gated)
    np.testing.assert_array_equal(gated(x), loaded(x))
    assert type(loaded.get_layer("inner").gate_aware_of) is layer
    assert parity_error(loaded(x), compact(loaded)(x)) <= 1e-5
    clone = keras.models.clone_model(gated)
    clone.set_weights(gated.get_weights())
    np.testing.assert_array_equal(gated(x), clone(x))


def test_masks_pass_the_wrapper():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True)(tokens)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    model = keras.Model(tokens, layers.Dense(2)(x))
    gated = insert_gates(model)
    data = np.array([[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 1, 2]])
    np.testing.assert_array_equal(model(data), gated(data))
    half_closed(gated)
    assert parity_error(gated(data), compact(gated)(data)) <= 1e-5


def test_the_input_may_be_given_by_keyword():
    inputs = keras.Input((5,))
    x = layers.LayerNormalization()(inputs=layers.Dense(8)(inputs))
    x = layers.LSTM(4)(sequences=layers.RepeatVector(3)(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    gated, data = insert_gates(model), random_inputs(model)
    assert len(aware(gated)) == 2
    assert parity_error(model(data), gated(data)) == 0
    half_closed(gated)
    assert parity_error(gated(data), compact(gated, verify=False)(data)) <= 1e-5


def test_a_frozen_wrapped_layer_stays_frozen():
    model = network(layers.LayerNormalization(name="norm"))
    model.get_layer("norm").trainable = False
    gated = insert_gates(model)
    assert not [v for v in gated.trainable_variables if v.path.startswith("norm")]
