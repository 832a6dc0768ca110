"""Residual branches whose neurons are all closed are cut out, exactly."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from tf_kfacprune.compaction import compact, compaction_report, parity_error, random_inputs
from tf_kfacprune.gates import GatedConv2D, GatedDense, GatedNetwork, NeuronGate, insert_gates
from tf_kfacprune.graph import CostModel, analyze
from tf_kfacprune.pruning import Budget
from tf_kfacprune.training import PrunableModel


def conv(x, filters, size, name, bias=True, activation="relu"):
    x = layers.Conv2D(filters, size, padding="same", use_bias=bias, name=name)(x)
    return layers.Activation(activation)(layers.BatchNormalization(name=f"{name}_bn")(x))


def bottlenecks(bias=True, projection=True):
    """ResNet: 1x1, 3x3, 1x1 and a shortcut that is projected in the first block."""
    inputs = keras.Input((6, 6, 3))
    x = conv(inputs, 6, 3, "stem")
    for k in range(2):
        y = conv(x, 4, 1, f"b{k}_in", bias)
        y = conv(y, 5, 3, f"b{k}_mid", bias, "sigmoid")
        y = conv(y, 8 if projection else 6, 1, f"b{k}_out", bias, "linear")
        if projection and k == 0:
            x = layers.BatchNormalization()(layers.Conv2D(8, 1, name="projection")(x))
        x = layers.ReLU()(layers.Add(name=f"add{k}")([x, y]))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x)))


def inverted():
    """MobileNet: expansion, depthwise, squeeze-and-excite, linear projection."""
    inputs = keras.Input((6, 6, 3))
    x = conv(inputs, 6, 3, "stem", activation="linear")
    for k in range(2):
        y = conv(x, 8, 1, f"b{k}_expand", activation="silu")
        y = layers.DepthwiseConv2D(3, padding="same", name=f"b{k}_depthwise")(y)
        y = layers.Activation("silu")(layers.BatchNormalization()(y))
        s = layers.GlobalAveragePooling2D(keepdims=True)(y)
        s = layers.Conv2D(3, 1, activation="relu", name=f"b{k}_squeeze")(s)
        s = layers.Conv2D(8, 1, activation="sigmoid", name=f"b{k}_excite")(s)
        y = conv(layers.Multiply()([y, s]), 6, 1, f"b{k}_project", activation="linear")
        x = layers.Add(name=f"add{k}")([x, layers.Dropout(0.3)(y)])
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def feed_forward():
    """A transformer's dense branches, written with operators, with one nested in another."""
    inputs = keras.Input((7, 5))
    x = layers.Dense(6, name="embed")(inputs)
    inner = layers.Dense(9, activation="gelu", name="b0_wide")(layers.LayerNormalization()(x))
    inner = inner + layers.Dense(9, name="b1_out")(layers.Dense(4, name="b1_wide")(inner))
    x = x + layers.Dense(6, name="b0_out")(inner)
    return keras.Model(inputs, layers.Dense(2, name="head")(ops.mean(x, axis=1)))


def two_branches_of_one_layer():
    """What both branches need goes only when both are gone, which no single group decides."""
    inputs = keras.Input((5,))
    x = layers.Dense(6, name="stem")(inputs)
    common = layers.Dense(4, activation="tanh", name="common")(x)
    for k in range(2):
        y = layers.Dense(3, activation="relu", name=f"b{k}_in")(common)
        x = layers.Add()([x, layers.Dense(6, name=f"b{k}_out")(y)])
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


REMOVABLE = {
    bottlenecks: {"b0_mid", "b1_mid"},
    inverted: {"b0_expand", "b1_expand"},
    feed_forward: {"b0_wide", "b1_wide"},
}


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in ("beta", "moving_mean", "bias"):
            weight.assign(rng.normal(size=weight.shape))
        if kind in ("gamma", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def removable(model):
    channels = analyze(model)
    return {channels.groups[g].name for g in CostModel(channels).branches.removable}


def close(gated, *names, seed=None):
    """Closes whole groups; with a seed, others partly and softly."""
    network = GatedNetwork(gated)
    (bank,) = network.sources
    values = np.ones(bank.size)
    if seed is not None:
        rng = np.random.default_rng(seed)
        values = rng.uniform(0.3, 1, bank.size) * (rng.uniform(size=bank.size) < 0.7)
    for group in network.channels.groups:
        if group.name in names:
            values[group.start : group.start + group.size] = 0
    bank.set_values(values)
    return network


def check(gated, model):
    """Parity, exact costs and the report of a compacted network; returns it."""
    network, x = GatedNetwork(gated), random_inputs(model)
    small = compact(gated, verify=False)
    assert parity_error(gated(x, training=False), small(x, training=False)) <= 5e-6
    keep = network.kept_neurons()
    assert small.count_params() == network.cost.count("params", keep)
    assert CostModel(analyze(small)).macs_dense == network.cost.count("macs", keep)
    for measure in ("macs", "params"):
        fraction = float(network.cost.fraction(measure, keep.astype("float32")))
        exact = network.cost.count(measure, keep) / network.cost.dense(measure)
        assert fraction == pytest.approx(exact, rel=1e-5)
    compaction_report(gated, small)
    return small


@pytest.mark.parametrize("build", REMOVABLE)
def test_the_groups_that_decide_about_a_branch_are_removable(build):
    assert removable(build()) == REMOVABLE[build]
    gated = GatedNetwork(insert_gates(build()))
    found = {gated.channels.groups[g].name for g in gated.cost.branches.removable}
    assert found == REMOVABLE[build]


@pytest.mark.parametrize("seed", [None, 1], ids=["hard", "soft"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("build", REMOVABLE)
def test_closed_branches_are_cut_out(build, which, seed):
    model = randomize(build())
    gated = insert_gates(model)
    names = [sorted(REMOVABLE[build])[:1], sorted(REMOVABLE[build])[1:], REMOVABLE[build]][which]
    close(gated, *names, seed=seed)
    small = check(gated, model)
    for name in names:
        branch = name.split("_")[0]
        assert not [x.name for x in small.layers if x.name.startswith(f"{branch}_")]


def test_a_branch_without_a_constant_leaves_nothing_behind():
    model = bottlenecks(bias=False)
    gated = insert_gates(model)
    for k in range(2):  # without shifts the branch is zero
        model.get_layer(f"b{k}_out_bn").moving_mean.assign(np.zeros(8))
    close(gated, "b0_mid", "b1_mid")
    small = check(gated, model)
    kinds = {type(layer) for layer in small.layers}
    assert layers.Add not in kinds
    assert layers.Rescaling not in kinds


def test_a_constant_that_remains_is_added(tmp_path):
    model = randomize(bottlenecks())
    gated = insert_gates(model)
    close(gated, "b1_mid")
    small = check(gated, model)
    assert small.get_layer("add1_constant").offset == pytest.approx(
        branch_value(model, "b1"), rel=1e-5, abs=1e-6
    )
    small.save(tmp_path / "small.keras")
    x = random_inputs(model)
    assert parity_error(small(x), keras.saving.load_model(tmp_path / "small.keras")(x)) == 0


def branch_value(model, branch):
    bn = model.get_layer(f"{branch}_out_bn")
    bias = model.get_layer(f"{branch}_out").bias.numpy()
    scale = bn.gamma.numpy() / np.sqrt(bn.moving_variance.numpy() + bn.epsilon)
    return (bias - bn.moving_mean.numpy()) * scale + bn.beta.numpy()


def test_what_two_branches_share_is_not_taken_away_by_one():
    assert removable(two_branches_of_one_layer()) == set()


@keras.saving.register_keras_serializable("tests")
def last_add(make):
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    x = make(x, layers.Conv2D(5, 3, padding="same", activation="relu", name="inner")(x))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))


def outer(x, **kwargs):
    return layers.Conv2D(4, 3, padding="same", name="outer", **kwargs)(x)


KEPT = {
    "multiplied": lambda x, y: layers.Multiply()([x, outer(y)]),
    "concatenated": lambda x, y: layers.Concatenate()([x, outer(y)]),
    "padded borders": lambda x, y: layers.Add()(
        [x, layers.Conv2D(4, 3, padding="same")(outer(y, activation="relu"))]
    ),
    "pooled": lambda x, y: layers.Add()(
        [x, layers.AveragePooling2D(3, strides=1, padding="same")(outer(y))]
    ),
    "used elsewhere": lambda x, y: layers.Concatenate()([layers.Add()([x, (b := outer(y))]), b]),
    "read with others": lambda x, y: layers.Add()([x, outer(layers.Concatenate()([y, x]))]),
    "no shortcut": lambda x, y: layers.Add()([layers.Conv2D(4, 1)(y), outer(y)]),
    "broadcast shortcut": lambda x, y: layers.Add()(
        [layers.GlobalAveragePooling2D(keepdims=True)(x), outer(y)]
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_other_groups_keep_at_least_one_neuron(case):
    model = randomize(last_add(KEPT[case]))
    assert "inner" not in removable(model)
    gated = insert_gates(model)
    network = close(gated, "inner", "inner:2")
    inner = next(group for group in network.channels.groups if "inner" in group.producers)
    assert network.kept_neurons()[inner.start : inner.start + inner.size].sum() == 1
    check(gated, model)


def test_the_simple_case_is_removable():
    model = last_add(lambda x, y: layers.Add()([x, outer(y)]))
    assert removable(model) == {"inner"}


def test_branches_of_models_gated_by_hand_go_too():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    y = GatedConv2D(5, 3, padding="same", activation="relu", name="inner")(x)
    y = GatedConv2D(4, 3, padding="same", name="outer")(y)
    x = layers.Add()([x, y])
    x = layers.Flatten()(NeuronGate(name="late")(x))
    net = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    sources = {source.name: source for source in GatedNetwork(net).sources}
    sources["outer_gate"].set_values(np.zeros(5))
    small = check(net, net)
    assert "outer" not in {layer.name for layer in small.layers}


def test_shared_layers_stay_while_one_call_is_needed():
    inputs = keras.Input((6,))
    shared = layers.Dense(6, activation="relu", name="shared")
    x = shared(layers.Dense(6, name="stem")(inputs))
    y = layers.Dense(4, name="b_in")(shared(x))
    x = layers.Add()([x, layers.Dense(6, name="b_out")(y)])
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    gated = insert_gates(model)
    assert removable(model) == {"b_in"}
    close(gated, "b_in")
    names = {layer.name for layer in check(gated, model).layers}
    assert "shared" in names
    assert "b_out" not in names


def test_channels_first_branches():
    inputs = keras.Input((3, 6, 6))
    options = {"padding": "same", "data_format": "channels_first"}
    x = layers.Conv2D(4, 3, name="stem", **options)(inputs)
    y = layers.Conv2D(5, 3, name="inner", activation="relu", **options)(x)
    y = layers.BatchNormalization(axis=1)(layers.Conv2D(4, 3, name="outer", **options)(y))
    x = layers.ReLU()(layers.Add(name="add")([x, y]))
    x = layers.GlobalAveragePooling2D(data_format="channels_first")(x)
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    assert removable(model) == {"inner"}
    gated = insert_gates(model)
    network = close(gated, "inner")
    assert network.kept_neurons().sum() == 4
    small = compact(gated, verify=False)
    assert np.shape(small.get_layer("add_constant").offset) == (4, 1, 1)
    assert small.count_params() == network.cost.count("params", network.kept_neurons())


def test_half_precision_branches_stay_half():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = randomize(bottlenecks())
        gated = insert_gates(model)
    finally:
        keras.config.set_dtype_policy("float32")
    close(gated, "b1_mid")
    small = compact(gated)
    assert small.get_layer("add1_constant").compute_dtype == "float16"


@settings(max_examples=4, deadline=None, derandomize=True)
@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 99), min_channels=st.sampled_from([None, 1]))
def test_landing_may_remove_branches_unless_a_minimum_is_given(share, seed, min_channels):
    model = bottlenecks()
    cost = CostModel(analyze(model))
    ones = [1] * len(cost.channels.groups)
    least = cost.least("params", None if min_channels is None else ones)
    target = min(least + share**2 * (1 - least) + 1e-4, 0.999)
    pm = PrunableModel(model, Budget(params=target), min_channels=min_channels)
    rng = np.random.default_rng(seed)
    pm.controller.gate_parameters[0].assign(rng.normal(size=pm.gated.num_gates))
    pm.controller.land()
    small = compact(pm)
    assert small.count_params() <= target * model.count_params()
    if min_channels:
        assert {"b0_mid", "b1_mid"} <= {layer.name for layer in small.layers}


def test_the_least_cost_is_without_branches():
    cost = CostModel(analyze(bottlenecks()))
    assert cost.least("params") < cost.least("params", [1] * len(cost.channels.groups))
    model = randomize(bottlenecks())
    gated = insert_gates(model)
    network = GatedNetwork(gated)
    network.sources[0].set_values(np.zeros(network.num_gates))
    small = check(gated, model)
    assert small.count_params() / model.count_params() == pytest.approx(cost.least("params"))


def test_gradients_of_the_cost_are_finite_where_branches_are_open_or_closed():
    import tensorflow as tf

    cost = CostModel(analyze(bottlenecks()))
    n = cost.channels.num_neurons
    for openness in (np.ones(n), np.zeros(n), np.eye(n)[0], np.full(n, 0.5)):
        x = tf.constant(openness, "float32")
        with tf.GradientTape() as tape:
            tape.watch(x)
            fraction = cost.fraction("params", x)
        assert np.isfinite(tape.gradient(fraction, x).numpy()).all()


def test_gated_dense_models_without_branches_are_as_before():
    inputs = keras.Input((10,))
    net = keras.Model(inputs, GatedDense(3)(layers.Dense(8, activation="relu")(inputs)))
    assert not GatedNetwork(net).cost.branches.removable
