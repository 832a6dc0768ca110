"""Predicted sizes of `.tflite` files against the files that the converter writes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tests.graph.file_layout import needs_fitted_layout
from tf_kfacprune import PrunableModel, compact
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze
from tf_kfacprune.pruning import Budget
from tf_kfacprune.reporting.figures import tflite_size


def convolutional():
    inputs = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(24, 3, use_bias=False, name="conv1")(inputs)
    x = layers.ReLU(name="relu1")(layers.BatchNormalization(name="bn1")(x))
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Conv2D(32, 3, padding="same", activation="relu", name="conv2")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="convolutional")


def dense():
    inputs = keras.Input((200,), name="features")
    x = layers.Dense(120, activation="relu", name="fc1")(inputs)
    x = layers.Dense(60, activation="relu", name="fc2")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="dense")


def residual():
    inputs = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="stem")(inputs)
    for block in ("a", "b", "c"):
        y = layers.Conv2D(16, 3, padding="same", activation="relu", name=f"{block}1")(x)
        y = layers.BatchNormalization(name=f"{block}bn")(
            layers.Conv2D(16, 3, padding="same", name=f"{block}2")(y)
        )
        x = layers.ReLU(name=f"{block}relu")(layers.Add(name=f"{block}add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="residual")


def different_weights(model):
    """The converter stores equal weights once: after training none are equal."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.uniform(0.1, 1.0, weight.shape))


@needs_fitted_layout
@pytest.mark.parametrize(
    ("build", "options", "target"),
    [
        (convolutional, {}, 1.0),
        (convolutional, {}, 0.3),
        (convolutional, {"prune_features": True, "policy": "random", "seed": 0}, 0.3),
        (dense, {"prune_inputs": True}, 0.2),
    ],
    ids=["convolutional", "pruned", "features", "inputs"],
)
def test_the_file_is_as_large_as_predicted(build, options, target):
    pm = PrunableModel(build(), Budget(bytes=target), **options)
    if target < 1.0:
        rng = np.random.default_rng(0)
        for parameters in pm.controller.gate_parameters:
            parameters.assign(rng.normal(size=parameters.shape))
        pm.controller.land()
    small = compact(pm)
    different_weights(small)
    predicted = pm.gated.cost.exact("bytes", pm.gated.kept_neurons())
    assert tflite_size(small).raw == pytest.approx(predicted, rel=0.02)


@needs_fitted_layout
def test_a_normalization_that_cannot_be_folded_stores_scale_and_shift():
    inputs = keras.Input((5,))
    x = layers.Dense(8, name="fc")(inputs)
    folded = keras.Model(inputs, layers.Dense(2, name="out")(layers.BatchNormalization()(x)))
    plain = keras.Model(inputs, layers.Dense(2, name="out")(x))
    relu = layers.Dense(8, activation="relu", name="fc")(inputs)
    kept = keras.Model(inputs, layers.Dense(2, name="out")(layers.BatchNormalization()(relu)))
    sizes = [CostModel(analyze(model)).dense("bytes") for model in (plain, folded, kept)]
    assert sizes[0] == sizes[1]
    assert sizes[2] > sizes[1] + 2 * 4 * 8


@needs_fitted_layout
def test_a_removed_branch_leaves_a_constant():
    network = residual()
    different_weights(network)
    gated = insert_gates(network)
    (bank,) = GatedNetwork(gated).sources
    values, errors = np.ones(bank.size), []
    cost = GatedNetwork(gated).cost
    branches = sorted(cost.branches.removable)
    for branch in (None, *branches):
        if branch is not None:
            group = cost.channels.groups[branch]
            values[group.start : group.start + group.size] = 0.0
        bank.set_values(values)
        predicted = cost.exact("bytes", GatedNetwork(gated).kept_neurons())
        errors.append(tflite_size(compact(gated)).raw - predicted)
    assert len(branches) == 3
    # A constant of 16 values has 108 bytes: forgotten, files would be larger than predicted.
    change = np.diff(errors)
    assert (change <= 0).all()
    assert (change > -108).all()
