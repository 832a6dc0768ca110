"""Custom layers are opened where that is exact, and stay opaque, with the reason, elsewhere."""

from __future__ import annotations

import re
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_kfacprune as kp
from tests.graph import custom_layers as custom
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph import CostModel, analyze, opaque_layers, trace_opened
from tf_kfacprune.graph.rules.registry import has_rule


def to_numpy(x):
    return np.asarray(ops.convert_to_tensor(x))


def randomized(model):
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "seed" not in weight.path:
            weight.assign(rng.uniform(0.3, 1.0, weight.shape))
    return model


def blocks():
    inputs = keras.Input((8,))
    shared = custom.Block(6, name="block2")
    x = custom.Block(5, name="block1")(layers.Dense(8, name="stem")(inputs))
    x = shared(shared(x, twice=True), training=False)
    return randomized(keras.Model(inputs, layers.Dense(3, name="head")(x)))


def sizes():
    inputs = keras.Input((None, 8))
    return randomized(keras.Model(inputs, custom.SizeOfData(name="sized")(inputs)))


def masks():
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(5, 6, mask_zero=True, name="embedding")(tokens)
    x = custom.Masked(name="masked")(x)
    x = layers.GlobalAveragePooling1D()(custom.Masked(name="masked2")(x))
    return randomized(keras.Model(tokens, x))


def half():
    inputs = keras.Input((6,))
    x = custom.FeedForward(5, dtype="mixed_float16", name="ffn")(inputs)
    return randomized(keras.Model(inputs, custom.Scale(dtype="mixed_float16")(x)))


def modes():
    inputs = keras.Input((6,))
    x, empty = custom.AroundSilentMode(name="around")(layers.Dense(5, name="stem")(inputs))
    return randomized(keras.Model(inputs, [layers.Dense(3, name="head")(x), empty]))


def tokens():
    inputs = keras.Input((3, 6))
    return randomized(keras.Model(inputs, custom.Tokens(name="tokens")(inputs)))


def noises():
    inputs = keras.Input((None, 6))
    x = custom.NoiseInTraining(name="noise")(layers.Dense(6, name="stem")(inputs))
    x = custom.DropsPaths(name="paths")(x)
    return randomized(keras.Model(inputs, [layers.Dense(3, name="head")(x), x]))


def windows():
    inputs = keras.Input((None, 6))
    return randomized(keras.Model(inputs, custom.Windows(name="windows")(inputs)))


def mistaken():
    inputs = keras.Input((None, 6))
    return randomized(keras.Model(inputs, custom.CallsMistaken(name="calls")(inputs)))


def stacked():
    inputs = keras.Input((None, 6))
    both = ops.stack([inputs, 2.0 * inputs])
    return randomized(keras.Model(inputs, custom.Stacked(name="stacked")(both, inputs)))


def table():
    inputs = keras.Input((None, 6))
    return randomized(keras.Model(inputs, custom.TableOfPositions(name="table")(inputs)))


def example(model):
    rng = np.random.default_rng(1)
    length = 7 if "table" in [layer.name for layer in model.layers] else 5
    shape = (4, *(length if n is None else n for n in model.inputs[0].shape[1:]))
    if "int" in model.inputs[0].dtype:
        return rng.integers(0, 5, shape).astype("int32")
    return rng.normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    "build",
    [blocks, sizes, masks, half, modes, tokens, noises, windows, mistaken, stacked, table],
)
@pytest.mark.parametrize("training", [False, True])
def test_opened_graph_equals_the_model_to_the_bit_in_both_modes(build, training):
    model = build()
    graph = trace_opened(model)
    assert graph.opened
    assert not graph.closed
    assert all(has_rule(call.operation) for call in graph.calls if call.is_layer)
    x, before = example(model), [to_numpy(v) for v in model.variables]
    expected = [to_numpy(y) for y in keras.tree.flatten(model(x, training=training))]
    after = [to_numpy(v) for v in model.variables]
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    for y, wanted in zip(
        keras.tree.flatten(graph.run(x, training=training)), expected, strict=True
    ):
        np.testing.assert_array_equal(to_numpy(y), wanted)
    for variable, value in zip(model.variables, after, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


def test_opening_leaves_weights_and_seeds_as_they_were():
    model = blocks()
    before = [to_numpy(v) for v in model.variables]
    trace_opened(model)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


def test_paths_are_unique_and_tell_where_a_layer_is():
    graph = trace_opened(blocks())
    owners: dict[str, object] = {}
    assert all(owners.setdefault(c.path, c.operation) is c.operation for c in graph.calls)
    assert {"block1/ffn/dense", "block2/ffn/dense", "block1/scale/gamma"} <= set(owners)
    assert list(graph.opened)[:3] == ["block1", "block1/ffn", "block1/scale"]


def test_shared_layers_stay_shared_and_keyword_arguments_count():
    graph = trace_opened(blocks())
    calls = [call for call in graph.calls if call.path == "block2/ffn/dense"]
    assert len(calls) == 3  # twice in the first call of the block, once in the second
    assert len({id(call.operation) for call in calls}) == 1


def test_neurons_inside_and_across_blocks_are_found():
    channels = analyze(blocks())
    sizes_by_name = {group.name: group.size for group in channels.groups}
    assert sizes_by_name == {"stem": 8, "block1/ffn/dense": 5, "block2/ffn/dense": 6}
    (stream,) = (group for group in channels.groups if group.name == "stem")
    assert set(stream.producers) == {"stem", "block1/ffn/dense_out", "block2/ffn/dense_out"}


def test_own_weights_reach_gradients_through_the_opened_graph():
    model = blocks()
    graph, scale = trace_opened(model), model.get_layer("block1").scale
    with tf.GradientTape() as tape:
        loss = ops.sum(graph.run(example(model), training=False) ** 2)
    assert np.abs(to_numpy(tape.gradient(loss, scale.gamma.value))).max() > 0


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (custom.Branching, "something else in training"),
        (custom.Baking, "computes something else"),
        (custom.Drawing, "computes something else|does not run"),
        (custom.Counting, "symbolic tensors: AttributeError"),
        (custom.Deciding, "symbolic tensors"),
        (custom.CentersInTraining, "something else in training"),
        (lambda: custom.CallsMistaken(custom.DecidingPairs), "symbolic tensors"),
        (lambda: layers.Lambda(lambda x: tf.nn.relu(x), output_shape=(6,)), "symbolic tensors"),
        (lambda: custom.FeedForward(3, activity_regularizer="l2"), "activity_regularizer"),
    ],
)
def test_what_cannot_be_opened_stays_whole_with_the_reason(layer, reason):
    inputs = keras.Input((6,))
    x = layer()(layers.Dense(6, name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(x))
    (opaque,) = opaque_layers(trace_opened(model))
    assert opaque.layer is model.layers[2]
    assert re.search(reason, opaque.reason)


def test_noise_passes_channels():
    channels = analyze(noises())
    assert not opaque_layers(channels.graph)
    assert {"noise/dropout", "paths"} <= {call.path for call in channels.graph.calls}


def test_costs_are_of_a_length_that_the_network_takes():
    model = table()
    head = layers.Dense(3, name="head")(model.output)
    model = keras.Model(model.input, head)
    assert CostModel(analyze(model)).macs_dense == 7 * 6 * 3


def test_opening_is_switched_off_per_layer_and_per_class():
    model = blocks()
    kp.keep_opaque(model.get_layer("block1"))
    graph = trace_opened(model)
    assert graph.closed == {"block1": "kept opaque by the caller"}
    assert "block2" in graph.opened

    @kp.keep_opaque
    class Closed(custom.FeedForward):
        pass

    inputs = keras.Input((6,))
    graph = trace_opened(keras.Model(inputs, Closed(3, name="closed")(inputs)))
    assert list(graph.closed) == ["closed"]
    with pytest.raises(InvalidArgumentError, match="class of layers"):
        kp.keep_opaque("block1")


def test_a_layer_with_a_rule_of_its_own_is_not_opened():
    @kp.register_channel_rule(custom.Scale)
    class ScaleRule(kp.ChannelRule):
        """Each channel alone."""

        weights: ClassVar = {"gamma": ("channels",), "beta": ("channels",)}

        def propagate(self, call, flow):
            axes = flow.of(call.inputs[0])
            flow.role(call.operation, "channels", axes[-1], call.path)
            return [axes]

    try:
        graph = trace_opened(blocks())
        assert "block1/scale" not in graph.opened
        assert any(call.path == "block1/scale" for call in graph.calls)
    finally:
        from tf_kfacprune.graph.rules import registry

        del registry._LAYER_RULES[custom.Scale]


def test_keras_is_left_as_it_was():
    def functions():
        ours = ops.shape, ops.reshape, ops.arange, keras.KerasTensor.__getitem__
        return *ours, tf.Tensor.__getitem__, tf.linalg.band_part, tf.gather

    before = functions()
    trace_opened(windows())
    assert before == functions()
