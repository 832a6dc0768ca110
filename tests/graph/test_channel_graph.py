from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.graph import (
    ChannelRule,
    analyze,
    keep_opaque,
    reasons,
    register_channel_rule,
)
from tf_kfacprune.graph.rules import rule_for


def chain(*middle, units=6, features=5):
    return keras.Sequential(
        [
            keras.Input((features,)),
            layers.Dense(units, name="first"),
            *middle,
            layers.Dense(3, name="second"),
            layers.Dense(2, name="head"),
        ]
    )


def image_chain(*middle):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(6, 3, name="first"),
            *middle,
            layers.Conv2D(4, 1, name="second"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, name="head"),
        ]
    )


def sizes(model, **kwargs):
    return {group.name: group.size for group in analyze(model, **kwargs).groups}


def why(model, layer="first", **kwargs):
    return {frozen.reason for frozen in analyze(model, **kwargs).frozen if frozen.layer == layer}


def test_lenet_300_100_has_the_groups_of_the_literature():
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Flatten(),
            layers.Dense(300, name="fc1"),
            layers.Dense(100, name="fc2"),
            layers.Dense(10, name="fc3"),
        ]
    )
    assert sizes(model) == {"fc1": 300, "fc2": 100}
    with_inputs = analyze(model, prune_inputs=True)
    assert [group.size for group in with_inputs.groups] == [784, 300, 100]
    assert [group.start for group in with_inputs.groups] == [0, 784, 1084]
    assert with_inputs.groups[1].consumers == ("fc2",)
    assert with_inputs.num_neurons == 1184


def test_flatten_repeats_each_channel_at_every_position():
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.Conv2D(3, 3), layers.Flatten(), layers.Dense(2)]
    )
    (edge,) = analyze(model).edges
    assert edge.neurons.tolist() == [0, 1, 2] * 4


def test_residual_stream_is_one_group_of_all_its_producers():
    inputs = keras.Input((6,))
    x = layers.Dense(5, name="stem")(inputs)
    for k in range(2):
        x = layers.Add()([x, layers.Dense(5, name=f"out{k}")(layers.Dense(7, name=f"in{k}")(x))])
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    stream, inner0, _ = analyze(model).groups
    assert stream.producers == ("stem", "out0", "out1")
    assert stream.consumers == ("in0", "in1", "head")
    assert (inner0.name, inner0.size) == ("in0", 7)


def test_concatenation_keeps_its_parts_apart():
    inputs = keras.Input((6,))
    a, b = layers.Dense(3, name="a")(inputs), layers.Dense(4, name="b")(inputs)
    x = layers.Concatenate()([a, inputs, b])
    channels = analyze(keras.Model(inputs, layers.Dense(2)(x)))
    assert channels.edges[-1].neurons.tolist() == [0, 1, 2, *[7] * 6, 3, 4, 5, 6]


def test_partly_joined_channels_of_one_layer_form_separate_groups():
    inputs = keras.Input((6,))
    a, b = layers.Dense(3, name="a")(inputs), layers.Dense(4, name="b")(inputs)
    wide = layers.Dense(7, name="wide")(inputs)
    x = layers.Add()([layers.Concatenate()([a, b]), wide])
    channels = analyze(keras.Model(inputs, layers.Dense(2)(x)))
    found = {group.name: (group.size, group.producers) for group in channels.groups}
    assert found == {"a": (3, ("a", "wide")), "b": (4, ("b", "wide"))}


def test_grouped_convolution_ties_slots_across_groups():
    model = image_chain(layers.Conv2D(8, 3, groups=2, name="grouped"))
    channels = analyze(model)
    assert {group.name: group.size for group in channels.groups} == {
        "first": 3,
        "grouped": 4,
        "second": 4,
    }
    edge = next(edge for edge in channels.edges if edge.layer.name == "grouped")
    assert edge.neurons.tolist() == [0, 1, 2, 0, 1, 2]


def test_convolution_with_one_channel_per_group_is_depthwise():
    model = image_chain(layers.Conv2D(12, 3, groups=6, name="depthwise"))
    channels = analyze(model)
    assert sizes(model) == {"first": 6, "second": 4}
    assert [edge.layer.name for edge in channels.edges] == ["second", "head"]


def test_heads_are_tied_when_channels_are_split_over_two_axes():
    inputs = keras.Input((6,))
    x = layers.Reshape((4, 3))(layers.Dense(12, name="first")(inputs))
    x = layers.Flatten()(layers.Activation("relu")(x))
    assert sizes(keras.Model(inputs, layers.Dense(2)(x))) == {"first": 4}


FREEZING = [
    (layers.Activation("softmax"), reasons.CROSS_CHANNEL_ACTIVATION),
    (layers.Softmax(), reasons.CROSS_CHANNEL_ACTIVATION),
    (layers.Activation(lambda x: x - ops.mean(x, -1)), reasons.UNKNOWN_ACTIVATION),
    (layers.Rescaling(scale=[1.0, 2, 3, 4, 5, 6]), reasons.ARRAY_CONSTANT),
    (layers.Normalization(mean=np.ones(6), variance=np.ones(6)), reasons.ARRAY_CONSTANT),
    (keep_opaque(layers.Lambda(lambda x: x)), reasons.UNKNOWN_OPERATION),
]


@pytest.mark.parametrize(("layer", "reason"), FREEZING, ids=lambda x: type(x).__name__)
def test_operations_that_mix_channels_freeze_with_the_reason(layer, reason):
    assert why(chain(layer)) == {reason}


@pytest.mark.parametrize(
    "layer",
    [
        layers.Activation("gelu"),
        layers.ELU(),
        layers.ReLU(6),
        layers.PReLU(),
        layers.BatchNormalization(),
        layers.LayerNormalization(),
        layers.RMSNormalization(),
        layers.UnitNormalization(),
        layers.GroupNormalization(groups=2),
        layers.Dropout(0.1),
        layers.GaussianNoise(0.1),
        layers.AlphaDropout(0.1),
        layers.Rescaling(2.0, 1.0),
        layers.Identity(),
        layers.Dense(6, activation="tanh"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_operations_that_keep_channels_apart_freeze_nothing(layer):
    assert why(chain(layer)) == set()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: ops.clip(x, np.zeros(6, "float32"), 1.0),
        lambda x: ops.concatenate([x, np.ones((1, 6), "float32")], axis=0),
    ],
)
def test_array_constants_freeze(make):
    inputs = keras.Input((5,))
    x = make(layers.Dense(6, name="first")(inputs))
    assert why(keras.Model(inputs, layers.Dense(2)(x))) == {reasons.ARRAY_CONSTANT}


def test_scalar_constants_do_not_freeze():
    inputs = keras.Input((5,))
    x = ops.clip(3.0 - 2.0 * layers.Dense(6, name="first")(inputs) / 7.0, -1.0, 1.0)
    assert why(keras.Model(inputs, layers.Dense(2)(x))) == set()


def test_a_single_channel_that_is_broadcast_is_frozen_and_the_others_are_not():
    inputs = keras.Input((5,))
    x = layers.Dense(6, name="first")(inputs)
    attention = layers.Dense(1, activation="sigmoid", name="one")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.Multiply()([x, attention])))
    assert why(model, "first") == set()
    assert why(model, "one") == {reasons.BROADCAST}


def test_channels_added_to_the_inputs_are_frozen_unless_inputs_are_prunable():
    inputs = keras.Input((5,))
    x = layers.Add()([inputs, layers.Dense(5, name="first")(inputs)])
    model = keras.Model(inputs, layers.Dense(2)(x))
    assert why(model) == {reasons.UNTRACKED_OPERAND}
    assert why(model, prune_inputs=True) == set()


def test_outputs_recorded_as_frozen():
    assert why(chain(), "head") == {reasons.MODEL_OUTPUT}


@pytest.mark.parametrize("way", ["lora", "int8"])
def test_nothing_to_prune_is_put_down_to_weights_that_are_not_plain(way):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, name="first"),
            layers.EinsumDense("ab,bc->ac", 4, name="second"),
        ]
    )
    for layer in model.layers:
        if way == "lora":
            layer.enable_lora(2)
        else:
            layer.quantize("int8")
    frozen = {record.layer: record for record in analyze(model).frozen}
    assert {name: record.channels for name, record in frozen.items()} == {"first": 8, "second": 4}
    with pytest.raises(UnsupportedModelError, match=r"'first' .8 channels.*adapted by LoRA"):
        kp.PrunableModel(model, kp.Budget(macs=0.5))


def test_lora_weights_are_left_alone():
    model = chain()
    model.get_layer("second").enable_lora(2)
    assert why(model) == {reasons.WEIGHTS_NOT_PLAIN}


def test_a_layer_of_one_neuron_is_frozen():
    assert why(chain(units=1)) == {reasons.ONLY_NEURON}


@pytest.mark.parametrize("entry", ["first", "fir.*", "object"])
def test_excluded_layers_keep_all_their_neurons(entry):
    model = chain()
    entry = model.get_layer("first") if entry == "object" else entry
    assert why(model, exclude=[entry]) == {reasons.EXCLUDED}
    assert sizes(model, exclude=[entry]) == {"second": 3}


def test_excluding_a_layer_that_does_not_exist_is_an_error():
    with pytest.raises(InvalidArgumentError, match="'frist'"):
        analyze(chain(), exclude=["frist"])


class Doubling(layers.Layer):
    def call(self, x):
        return 2 * x


class SpatialMean(layers.GlobalAveragePooling2D):
    def call(self, x):
        return ops.sum(super().call(x), axis=-1, keepdims=True)


def test_unknown_layers_freeze_until_a_rule_is_registered():
    assert why(chain(keep_opaque(Doubling()))) == {reasons.UNKNOWN_OPERATION}
    assert why(chain(Doubling())) == set()  # opened

    @register_channel_rule(Doubling)
    class DoublingRule(ChannelRule):
        def propagate(self, call, flow):
            return [flow.of(call.inputs[0])]

    assert why(chain(Doubling())) == set()
    assert isinstance(rule_for(Doubling()), DoublingRule)


def test_products_over_channels_freeze_and_means_over_positions_do_not():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="first")(inputs)
    over_positions = keras.Model(inputs, layers.Dense(2)(ops.mean(x, axis=(1, 2))))
    assert why(over_positions) == set()
    over_channels = keras.Model(inputs, layers.Dense(2)(ops.prod(x, axis=-1)))
    assert why(over_channels) == {reasons.REDUCED}


def test_a_subclass_does_not_inherit_the_rule_of_its_base():
    inputs = keras.Input((8, 8, 3))
    x = keep_opaque(SpatialMean())(layers.Conv2D(4, 3, name="first")(inputs))
    assert why(keras.Model(inputs, layers.Dense(2)(x))) == {reasons.UNKNOWN_OPERATION}


def test_only_rules_for_layer_classes_can_be_registered():
    with pytest.raises(InvalidArgumentError, match="layer classes"):
        register_channel_rule(Doubling())
    with pytest.raises(InvalidArgumentError, match="subclass of ChannelRule"):
        register_channel_rule(Doubling)(int)


def test_channels_first_layers_have_their_channels_on_axis_one():
    model = keras.Sequential(
        [
            keras.Input((3, 8, 8)),
            layers.Conv2D(4, 3, data_format="channels_first", name="first"),
            layers.BatchNormalization(axis=1),
            layers.MaxPooling2D(data_format="channels_first"),
            layers.Conv2D(5, 3, data_format="channels_first", name="second"),
            layers.Flatten(data_format="channels_first"),
            layers.Dense(2, name="head"),
        ]
    )
    channels = analyze(model)
    assert [(edge.axis, edge.layer.name) for edge in channels.edges] == [(1, "second"), (1, "head")]
    assert channels.edges[-1].neurons.tolist() == [4, 5, 6, 7, 8]


def test_dynamic_image_sizes_are_analyzed():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(6, 3, name="first")(inputs)
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    assert sizes(keras.Model(inputs, layers.Conv2D(2, 1)(x))) == {"first": 6}


def test_every_part_of_a_split_keeps_a_group_of_its_own():
    inputs = keras.Input((5,))
    a, b = ops.split(layers.Dense(10, name="first")(inputs), [4], axis=-1)
    model = keras.Model(inputs, [layers.Dense(2)(a), layers.Dense(2)(b)])
    assert sizes(model) == {"first": 4, "first:2": 6}


def test_single_channels_picked_by_number_freeze_the_axis():
    inputs = keras.Input((5,))
    x = layers.Dense(6, name="first")(inputs)
    model = keras.Model(inputs, [layers.Dense(2)(x), x[:, 3]])
    assert why(model) == {reasons.PICKED}
