"""Layers that prepare data, within a model: channels pass them where that is exact."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.keras_features import IS_OLD
from tf_kfacprune.compaction import compact, parity_error
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze, opaque_layers, reasons, trace_opened

CHANNELWISE = [
    layers.RandomFlip(seed=1),
    layers.RandomRotation(0.1, seed=1),
    layers.RandomTranslation(0.1, 0.1, seed=1),
    layers.RandomZoom(0.2, seed=1),
    layers.RandomShear(0.2, seed=1),
    layers.RandomPerspective(seed=1),
    layers.RandomElasticTransform(seed=1),
    layers.RandomCrop(8, 8, seed=1),
    layers.RandomErasing(seed=1),
    layers.RandomGaussianBlur(seed=1),
    layers.RandomSharpness(0.5, seed=1),
    layers.RandomBrightness(0.2, value_range=(0, 1), seed=1),
    layers.RandomContrast(0.2, value_range=(0, 1), seed=1),
    layers.RandomInvert(value_range=(0, 1), seed=1),
    layers.RandomPosterization(4, value_range=(0, 1), seed=1),
    layers.Solarization(value_range=(0, 1), seed=1),
    layers.CutMix(seed=1),
    layers.MixUp(seed=1),
]
COLORS = [
    layers.RandomGrayscale(seed=1),
    layers.RandomHue(0.1, seed=1),
    layers.RandomSaturation(0.1, seed=1),
    layers.RandomColorJitter(seed=1),
    layers.RandomColorDegeneration(0.1, seed=1),
    layers.RandAugment(seed=1),
    layers.AugMix(seed=1),
]


def augmented(layer):
    inputs = keras.Input((8, 8, 3), name="x")
    x = layers.Conv2D(6, 3, padding="same", activation="sigmoid", name="first")(inputs)
    x = layers.Conv2D(4, 3, name="second")(layer(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.GlobalMaxPooling2D()(x)))


def of_type(layer):
    return type(layer).__name__


@pytest.mark.parametrize("layer", CHANNELWISE, ids=of_type)
def test_augmentation_of_every_channel_by_itself_passes(layer, assert_exact):
    model = augmented(layer)
    assert {record.layer for record in analyze(model).frozen} == {"head"}
    assert not opaque_layers(trace_opened(model))
    assert_exact(model)


@pytest.mark.parametrize("layer", COLORS, ids=of_type)
def test_augmentation_that_mixes_colors_freezes_them_but_not_inputs(layer, assert_exact):
    inputs = keras.Input((8, 8, 3), name="x")
    x = layers.Conv2D(6, 3, activation="tanh", name="first")(layer(inputs))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalMaxPooling2D()(x)))
    found = analyze(model, prune_inputs=True)
    assert {group.name: group.size for group in found.groups} == {"x": 3, "first": 6}
    assert not opaque_layers(found.graph)
    assert_exact(model, prune_inputs=True)


def test_colors_that_a_layer_makes_are_frozen_with_the_reason():
    inputs = keras.Input((8, 8, 3))
    x = layers.RandomHue(0.1)(layers.Conv2D(3, 1, name="colors")(inputs))
    channels = analyze(keras.Model(inputs, layers.Conv2D(2, 1)(x)))
    assert {f.reason for f in channels.frozen if f.layer == "colors"} == {reasons.MIXED_COLORS}


def test_augmentation_costs_nothing_in_files():
    plain, noisy = (
        CostModel(analyze(augmented(layer))) for layer in (layers.Identity(), layers.RandomFlip())
    )
    for measure in ("macs", "params", "ram"):
        assert noisy.dense(measure) <= plain.dense(measure)


LOOKUPS = {
    "one-hot": (layers.CategoryEncoding(8, output_mode="one_hot"), (1,)),
    "multi-hot": (layers.CategoryEncoding(8), (3,)),
    "bins": (layers.Discretization([1, 3, 5], output_mode="multi_hot"), (3,)),
    "hashes": (layers.Hashing(6, output_mode="multi_hot"), (3,)),
    "numbers": (layers.IntegerLookup(vocabulary=[*range(5)], output_mode="count"), (3,)),
}


MORE_BINS = pytest.mark.skipif(IS_OLD, reason="Discretization says one bin less than it has")


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=MORE_BINS) if name == "bins" else name for name in LOOKUPS],
)
def test_categories_are_input_features(case, assert_exact):
    layer, shape = LOOKUPS[case]
    numbers, other = keras.Input(shape, dtype="int64", name="numbers"), keras.Input((4,), name="x")
    looked_up = layer(numbers)
    x = layers.Concatenate(name="all")([looked_up, other])
    x = layers.Dense(7, activation="relu", name="hidden")(x)
    model = keras.Model([numbers, other], layers.Dense(2)(x))
    assert [g.name for g in analyze(model).groups] == ["hidden"]
    assert not opaque_layers(trace_opened(model))
    channels = analyze(model, prune_inputs=True)
    assert channels.groups[0].size == looked_up.shape[-1] + 4
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 8, (16, *shape)), rng.normal(size=(16, 4)).astype("float32")]
    assert_exact(model, data=data, prune_inputs=True)


def test_names_of_categories_are_looked_up_by_the_compact_model():
    names = keras.Input((1,), dtype="string", name="names")
    found = layers.StringLookup(vocabulary=["a", "b", "c"])(names)
    x = layers.Embedding(4, 6, name="table")(found)
    x = layers.Dense(5, activation="relu", name="hidden")(layers.Flatten()(x))
    gated = insert_gates(keras.Model(names, layers.Dense(2)(x)))
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(np.arange(bank.size) % 2)
    data = tf.constant([["a"], ["c"], ["?"]])
    assert parity_error(gated(data), compact(gated, verify_data=data)(data)) <= 1e-6


def test_what_layers_make_is_frozen_where_it_is_read_as_categories():
    inputs = keras.Input((5,))
    x = layers.Dense(3, name="made")(inputs)
    x = layers.CategoryEncoding(4)(keras.ops.cast(x, "int32"))
    channels = analyze(keras.Model(inputs, layers.Dense(2)(x)))
    assert {f.reason for f in channels.frozen if f.layer == "made"} == {reasons.CATEGORIES}


def test_data_to_verify_on_may_mix_arrays_and_tensors():
    number, other = keras.Input((3,), name="number"), keras.Input((2,), name="other")
    x = keras.layers.Concatenate()([keras.layers.Dense(4)(number), other])
    gated = insert_gates(keras.Model({"number": number, "other": other}, keras.layers.Dense(2)(x)))
    data = {"number": np.ones((5, 3), "float32"), "other": keras.ops.ones((5, 2))}
    small = compact(gated, verify_data=data)
    assert small.output_shape == (None, 2)
