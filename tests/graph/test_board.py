"""Flash and RAM of the int8 file: predicted, against the file and the runtime itself."""

from __future__ import annotations

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_kfacprune as kp
from tests.graph.file_layout import needs_fitted_layout
from tf_kfacprune.errors import BudgetError
from tf_kfacprune.export import check_micro, tflite
from tf_kfacprune.graph import CostModel, analyze
from tf_kfacprune.graph.sizes import Stack

HAS_MICRO = importlib.util.find_spec("tflite_micro") is not None


def funnel():
    """Two convolutions without padding on 8 x 8 pixels; the arena is easy to count."""
    x = inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(16, 1, activation="relu", name="wide")(x)
    x = layers.Conv2D(4, 1, strides=2, activation="relu", name="narrow")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(2, name="logits")(x), name="funnel")


def residual():
    x = inputs = keras.Input((16, 16, 2), name="image")
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="stem")(x)
    for block in ("a", "b"):
        y = layers.Conv2D(16, 3, padding="same", use_bias=False, name=f"{block}1")(x)
        y = layers.ReLU(name=f"{block}relu")(layers.BatchNormalization(name=f"{block}bn")(y))
        y = layers.Conv2D(16, 3, padding="same", name=f"{block}2")(y)
        x = layers.Add(name=f"{block}add")([x, y])
    x = layers.DepthwiseConv2D(3, strides=2, activation="relu", name="depthwise")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(5, name="logits")(x), name="residual")


def different_weights(model):
    """The converter stores equal weights once: after training none are equal."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        low = -1.0 if len(weight.shape) > 1 else 0.1  # a deep network of positive ones overflows
        weight.assign(rng.uniform(low, 1.0, weight.shape))


def flattened():
    x = inputs = keras.Input((14, 14, 2), name="image")
    x = layers.Conv2D(12, 3, activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Conv2D(32, 3, activation="relu", name="conv2")(x)
    x = layers.Dense(64, activation="relu", name="fc")(layers.Flatten(name="flatten")(x))
    return keras.Model(inputs, layers.Dense(5, name="logits")(x), name="flattened")


def landed(network, budget, **options):
    """A network that has landed on a budget by scores at random, and its compact model."""
    model = kp.PrunableModel(network, budget, **options)
    rng = np.random.default_rng(0)
    for parameters in model.controller.gate_parameters:
        parameters.assign(rng.normal(size=parameters.shape))
    model.controller.land()
    return model, kp.compact(model)


def file_of(model, path):
    different_weights(model)
    x = np.random.default_rng(0).random((16, *model.input_shape[1:])).astype("float32")
    return tflite(
        model, path, quantization="int8", representative_data=x, batch_size=1, verify=False
    )


def test_the_peak_is_counted_where_activations_live_together():
    """`wide` reads 64 and writes 16 * 64 bytes, `narrow` reads those and writes 4 * 16."""
    cost = CostModel(analyze(funnel()))
    everything = np.ones(cost.channels.num_neurons)
    records = cost.exact("ram", everything) - 64 * 17
    for left in (16, 12):
        openness = everything.copy()
        openness[left:16] = 0.0
        assert cost.exact("ram", openness) == records - 8 * (16 - left) + 64 * (1 + left)
        # Either operation is the peak: the input and the output of `narrow` have as many bytes.
        assert cost.ram_peak(openness) == "wide"
    # Of 12 tensors one is given and four are written: to plan them takes more than 64 * 5 bytes.
    openness[4:16] = 0.0
    assert cost.exact("ram", openness) == records - 8 * 12 + 48 + 40 * 12 + 28 * 5
    assert cost.ram_peak(openness) == "planning"


def test_closing_neurons_saves_memory_only_at_the_peak():
    cost = CostModel(analyze(residual()))
    openness = tf.Variable(np.ones(cost.channels.num_neurons))
    with tf.GradientTape() as tape:
        value = cost.cost("ram", openness)
    saved = tape.gradient(value, openness).numpy()
    assert float(value) == pytest.approx(cost.exact("ram", openness.numpy()))
    by_group = {group.name: saved[group.neurons] for group in cost.channels.groups}
    # At each peak three activations of 256 values a channel live, two of them of the skip's group.
    # The peaks are equal; each record of a channel is 8 bytes.
    for name in ("a1", "b1"):
        assert by_group[name].max() < 256
    skip = next(group for group in cost.channels.groups if "stem" in group.producers)
    assert saved[skip.neurons].min() > 2 * 256
    assert saved.min() >= 0.0


def test_a_stack_is_a_sum_and_the_largest_of_others():
    stack = Stack(
        np.array([1.0, 2.0, 3.0]), np.array([[0], [1], [2]], "int32"), np.array([0, 1, 2]), 2
    )
    sizes = tf.Variable([10.0, 5.0, 4.0])
    with tf.GradientTape() as tape:
        value = stack.value(sizes)
    assert float(value) == stack.exact(sizes.numpy()) == 10 + 12
    np.testing.assert_array_equal(tape.gradient(value, sizes), [1.0, 0.0, 3.0])


@needs_fitted_layout
@pytest.mark.parametrize(
    ("build", "options", "bounds"),
    [
        pytest.param(residual, {}, {"flash": 0.75, "ram": 0.6}, marks=pytest.mark.slow),
        (residual, {}, {"ram": 9_000}),
        (flattened, {"prune_features": True, "policy": "random", "seed": 0}, {"flash": 0.5}),
    ],
)
def test_a_landed_network_fits_as_predicted(build, options, bounds, tmp_path):
    model, small = landed(build(), kp.Budget(**bounds), **options)
    cost, kept = model.gated.cost, model.gated.kept_neurons()
    predicted = {m: cost.exact(m, kept) for m in ("flash", "ram")}
    for measure, bound in bounds.items():
        assert predicted[measure] <= (bound if bound > 1 else bound * cost.dense(measure))
    used = max(predicted[m] / (b if b > 1 else b * cost.dense(m)) for m, b in bounds.items())
    assert used > 0.9
    path = file_of(small, tmp_path / "small.tflite")
    assert path.stat().st_size == pytest.approx(predicted["flash"], rel=0.03)
    if HAS_MICRO:
        assert check_micro(path).arena_bytes == pytest.approx(predicted["ram"], rel=0.03)


def test_board_sizes_are_read_with_their_units():
    budget = kp.Budget.for_board(flash="256kB", ram="64 KiB", macs=0.5)
    assert budget.targets == {"macs": 0.5, "flash": 256_000, "ram": 65_536}
    assert kp.Budget.for_board(ram=48_000).targets == {"ram": 48_000}
    assert kp.Budget.for_board(flash="1.5MB").flash == 1_500_000
    assert kp.Budget.from_config(budget.get_config()) == budget


@pytest.mark.parametrize("size", ["12 apples", "0.5", -3, "kB", ""])
def test_board_sizes_that_make_no_sense_are_refused(size):
    with pytest.raises(BudgetError, match="`ram` of a board"):
        kp.Budget.for_board(ram=size)


def test_a_size_in_bytes_must_be_whole():
    with pytest.raises(BudgetError, match=r"`flash`.*whole number of bytes"):
        kp.Budget(flash=1000.5)
    with pytest.raises(BudgetError, match="at least one bound"):
        kp.Budget.for_board()


def test_inspect_tells_flash_ram_and_the_peak():
    found = kp.inspect(funnel())
    cost = CostModel(analyze(funnel()))
    assert (found.flash, found.ram) == (round(cost.dense("flash")), round(cost.dense("ram")))
    assert found.ram_peak == "wide"
    assert f"{found.ram:,} bytes of RAM, most of them at wide" in " ".join(str(found).split())


@pytest.mark.slow
@pytest.mark.parametrize("name", kp.zoo.NAMES)
def test_predictions_hold_for_every_network_of_the_zoo(name, tmp_path):
    model = kp.zoo.build(name, seed=0)
    found = kp.inspect(model)
    path = file_of(model, tmp_path / "net.tflite")
    assert 0.97 * found.flash <= path.stat().st_size <= 1.001 * found.flash
    if HAS_MICRO:
        assert check_micro(path).arena_bytes == pytest.approx(found.ram, rel=0.02)
