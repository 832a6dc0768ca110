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
from tf_kfacprune.export import arena_bytes, check_micro, tflite
from tf_kfacprune.export.arena import estimated_arena
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


def stacked(*stack, shape):
    return keras.Sequential([keras.Input(shape), *stack], name="net")


def rows(*stack):
    """Layers over a sequence, then a classifier."""
    head = [layers.GlobalAveragePooling1D(name="mean"), layers.Dense(4, name="logits")]
    return stacked(*stack, *head, shape=(40, 12))


def images(*stack):
    """Layers over an image, then a classifier."""
    head = [layers.GlobalMaxPooling2D(name="max"), layers.Dense(4, name="logits")]
    return stacked(*stack, *head, shape=(16, 16, 8))


def residual_rows():
    x = inputs = keras.Input((40, 12))
    x = layers.Conv1D(16, 3, padding="same", activation="relu", name="stem")(x)
    y = layers.Conv1D(16, 3, padding="same", use_bias=False, name="conv1")(x)
    y = layers.ReLU(name="relu1")(layers.BatchNormalization(name="bn")(y))
    y = layers.Conv1D(16, 3, padding="same", name="conv2")(y)
    x = layers.ReLU(name="relu2")(layers.Add(name="add")([x, y]))
    x = layers.Flatten(name="flatten")(layers.MaxPooling1D(2, name="pool")(x))
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="net")


def branched_rows():
    inputs = keras.Input((40, 12))
    a = layers.Conv1D(16, 3, padding="same", activation="relu", name="a")(inputs)
    b = layers.Conv1D(8, 5, padding="same", activation="relu", name="b")(inputs)
    x = layers.Concatenate(name="both")([a, b])
    x = layers.Conv1D(8, 3, activation="sigmoid", name="c")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="net")


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
        (residual_rows, {}, {"flash": 0.75, "ram": 0.8}),
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
    assert 0.9 * predicted["flash"] <= path.stat().st_size <= 1.001 * predicted["flash"]
    if HAS_MICRO:
        used = check_micro(path).arena_bytes
        assert 0.95 * predicted["ram"] <= used <= 1.001 * predicted["ram"]


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


def temporal():
    """Residual blocks of causal convolutions: simple rules leave gaps between activations."""
    x = inputs = keras.Input((128, 9))
    x = layers.Conv1D(32, 1, name="stem")(x)
    for k in range(4):
        y = x
        for part in "ab":
            name = f"block{k}{part}"
            y = layers.Conv1D(
                32, 3, padding="causal", dilation_rate=2**k, activation="relu", name=name
            )(y)
        x = layers.ReLU(name=f"relu{k}")(layers.Add(name=f"add{k}")([x, y]))
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="net")


def pre_activated_rows():
    x = inputs = keras.Input((40, 2))
    x = layers.Conv1D(16, 3, padding="same", name="stem")(x)
    for k in range(2):
        y = layers.ReLU(name=f"relu{k}")(layers.BatchNormalization(name=f"bn{k}")(x))
        y = layers.Conv1D(16, 3, padding="same", name=f"conv{k}")(y)
        x = layers.Add(name=f"add{k}")([x, y])
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="net")


def four_heads():
    inputs = keras.Input((16, 16, 8))
    x = layers.GlobalAveragePooling2D(name="mean")(layers.Conv2D(8, 3, name="conv")(inputs))
    return keras.Model(inputs, [layers.Dense(2, name=f"head{k}")(x) for k in range(4)], name="net")


def sum_of_three():
    x = inputs = keras.Input((16, 16, 8))
    parts = [layers.Conv2D(8, k, padding="same", name=f"conv{k}")(x) for k in (1, 3, 5)]
    x = layers.ReLU(name="relu")(layers.Add(name="sum")(parts))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="net")


# Networks of few operations each, so that what each layer takes is seen.
LAYERS = {
    "causal": lambda: rows(
        layers.Conv1D(16, 5, padding="causal", activation="relu", name="conv1"),
        layers.Conv1D(24, 3, padding="causal", dilation_rate=4, activation="relu", name="conv2"),
    ),
    "residual_rows": residual_rows,
    "temporal": temporal,
    "pre_activated_rows": pre_activated_rows,
    "four_heads": four_heads,
    "one_filter": lambda: rows(
        layers.Conv1D(1, 3, padding="causal", activation="relu", name="conv1"),
        layers.Conv1D(8, 3, name="conv2"),
    ),
    "leaky_rows": lambda: rows(
        layers.Conv1D(16, 3, name="conv1"),
        layers.BatchNormalization(name="bn"),
        layers.LeakyReLU(name="leaky"),
        layers.Conv1D(16, 3, activation="hard_silu", name="conv2"),
        layers.Conv1D(16, 3, activation="relu", name="conv3"),
        layers.BatchNormalization(name="bn3"),
    ),
    "flattened_head": lambda: stacked(
        layers.Conv2D(8, 3, name="conv"),
        layers.GlobalAveragePooling2D(keepdims=True, name="mean"),
        layers.Conv2D(5, 1, name="logits"),
        layers.Flatten(name="flatten"),
        layers.Softmax(name="softmax"),
        shape=(16, 16, 8),
    ),
    "branched_rows": branched_rows,
    "pooled_rows": lambda: rows(
        layers.Conv1D(16, 3, activation="tanh", name="conv"),
        layers.MaxPooling1D(2, name="max"),
        layers.AveragePooling1D(2, name="average"),
        layers.ZeroPadding1D(1, name="pad"),
    ),
    "depthwise_rows": lambda: rows(
        layers.DepthwiseConv1D(3, padding="same", activation="relu", name="depthwise"),
        layers.Conv1D(24, 1, activation="relu", name="pointwise"),
        layers.Cropping1D(1, name="crop"),
    ),
    "separable_rows": lambda: rows(
        layers.SeparableConv1D(16, 3, padding="same", activation="relu", name="conv1"),
        layers.SeparableConv1D(24, 3, padding="same", activation="relu", name="conv2"),
    ),
    "transposed_rows": lambda: stacked(
        layers.Conv1D(16, 3, strides=2, padding="same", activation="relu", name="down"),
        layers.Conv1DTranspose(24, 3, strides=2, padding="same", activation="relu", name="up"),
        layers.Conv1D(3, 1, name="out"),
        shape=(40, 12),
    ),
    "permuted_rows": lambda: rows(
        layers.Permute((2, 1), name="turn"), layers.Conv1D(16, 3, activation="relu", name="conv")
    ),
    "separable": lambda: images(
        layers.SeparableConv2D(16, 3, padding="same", use_bias=False, name="conv1"),
        layers.BatchNormalization(name="bn"),
        layers.ReLU(name="relu"),
        layers.SeparableConv2D(
            24, 3, strides=2, padding="same", depth_multiplier=2, activation="relu", name="conv2"
        ),
    ),
    "dilated": lambda: images(
        layers.Conv2D(16, 3, dilation_rate=2, padding="same", activation="relu", name="conv1"),
        layers.DepthwiseConv2D(3, dilation_rate=2, padding="same", name="conv2"),
    ),
    "transposed": lambda: stacked(
        layers.Conv2DTranspose(24, 3, strides=2, use_bias=False, name="up"),
        layers.BatchNormalization(name="bn"),
        layers.ReLU(name="relu"),
        layers.Conv2D(3, 1, name="out"),
        shape=(16, 16, 8),
    ),
    "bilinear": lambda: images(
        layers.Conv2D(16, 3, strides=2, activation="relu", name="down"),
        layers.UpSampling2D(2, interpolation="bilinear", name="up"),
    ),
    "nearest": lambda: images(
        layers.Conv2D(16, 3, strides=2, activation="relu", name="down"),
        layers.UpSampling2D((2, 3), name="up"),
    ),
    "leaky": lambda: images(
        layers.Conv2D(16, 3, name="conv1"),
        layers.PReLU(shared_axes=[1, 2], name="prelu"),
        layers.Conv2D(8, 3, name="conv2"),
        layers.LeakyReLU(name="leaky"),
    ),
    "activations": lambda: images(
        layers.Conv2D(16, 3, activation="elu", name="conv1"),
        layers.Conv2D(8, 3, activation="silu", name="conv2"),
    ),
    "normalized_input": lambda: images(
        layers.BatchNormalization(name="bn"), layers.Conv2D(16, 3, name="conv")
    ),
    "layer_norm": lambda: stacked(
        layers.Dense(32, name="fc1"),
        layers.LayerNormalization(name="norm"),
        layers.Dense(16, activation="relu", name="fc2"),
        layers.Flatten(name="flatten"),
        layers.Dense(4, name="logits"),
        shape=(40, 12),
    ),
    "rms_norm": lambda: images(
        layers.Conv2D(16, 3, name="conv1"),
        layers.RMSNormalization(name="norm"),
        layers.Conv2D(8, 3, name="conv2"),
    ),
    "group_norm": lambda: images(
        layers.Conv2D(16, 3, name="conv"),
        layers.GroupNormalization(4, name="norm"),
        layers.ReLU(name="relu"),
    ),
}
QUICK = {
    "temporal",
    "leaky_rows",
    "one_filter",
    "residual_rows",
    "transposed",
    "layer_norm",
    "activations",
}


@needs_fitted_layout
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS],
)
def test_predictions_hold_for_every_kind_of_layer(name, tmp_path):
    model = LAYERS[name]()
    found = kp.inspect(model)
    assert not found.lacking
    assert not found.unconfirmed
    path = file_of(model, tmp_path / "net.tflite")
    assert 0.86 * found.flash <= path.stat().st_size <= 1.001 * found.flash
    if HAS_MICRO:
        assert 0.94 * found.ram <= check_micro(path).arena_bytes <= 1.001 * found.ram
        estimated = estimated_arena(path.read_bytes()).bytes
        assert estimated == pytest.approx(arena_bytes(path), rel=0.03)


def test_a_sum_of_three_is_two_operations(tmp_path):
    """The converter adds the first two before it computes the third, which saves memory."""
    model = sum_of_three()
    found = kp.inspect(model)
    path = file_of(model, tmp_path / "net.tflite")
    assert 0.9 * found.flash <= path.stat().st_size <= 1.001 * found.flash
    if HAS_MICRO:
        assert check_micro(path).arena_bytes <= found.ram


def test_layers_that_no_microcontroller_runs_are_named():
    model = stacked(
        layers.Conv2D(8, 3, activation="gelu", name="conv"),
        layers.Conv2D(4, 3, activation="softplus", name="out"),
        shape=(8, 8, 2),
    )
    found = kp.inspect(model)
    assert [layer.split()[0] for layer in found.lacking] == ["'conv'"]
    assert found.unconfirmed == (("out", "activation softplus"),)
    text = " ".join(str(found).split())
    assert "no kernel for what becomes of 'conv' (GELU; activation='silu' needs none)" in text
    with (
        pytest.warns(UserWarning, match="will not run model 'net'"),
        pytest.warns(UserWarning, match=r"'out' \(activation softplus\)"),
    ):
        kp.PrunableModel(model, kp.Budget(flash=0.95))


@pytest.mark.slow
@pytest.mark.parametrize("name", kp.zoo.NAMES)
def test_predictions_hold_for_every_network_of_the_zoo(name, tmp_path):
    model = kp.zoo.build(name, seed=0)
    found = kp.inspect(model)
    path = file_of(model, tmp_path / "net.tflite")
    assert 0.97 * found.flash <= path.stat().st_size <= 1.001 * found.flash
    if HAS_MICRO:
        assert check_micro(path).arena_bytes == pytest.approx(found.ram, rel=0.02)
