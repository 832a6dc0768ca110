"""Flattened features as neurons: compact equals gated, and a channel goes with its features."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

from tf_kfacprune.compaction import compact, compensate, parity_error, random_inputs
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze, reasons


def chain(*tail, shape=(7, 5, 2), activation="softplus"):
    """Two convolutions, and what is done to their map; the last layer makes the output."""
    inputs = keras.Input(shape)
    conv = layers.Conv2D if len(shape) == 3 else layers.Conv1D
    x = conv(4, 3, padding="same", activation="relu", name="first")(inputs)
    x = conv(5, 3, activation=activation, name="second")(x)
    for layer in tail:
        x = layer(x)
    return keras.Model(inputs, x)


def head():
    return layers.Dense(6, activation="relu", name="fc"), layers.Dense(3, name="logits")


def flat():
    return layers.Flatten(name="flatten")


def readers(*, apart):
    """Two Dense layers on one flattened map, one of them behind a dropout if they are apart."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(5, 3, activation="relu", name="second")(inputs)
    x = layers.Flatten(name="flatten")(x)
    y = layers.Dropout(0.5, name="dropout")(x) if apart else x
    return keras.Model(inputs, [layers.Dense(3)(x), layers.Dense(2)(y)])


def read_elsewhere():
    """Channels that another layer reads stay though none of their features is open."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(5, 3, activation="relu", name="second")(inputs)
    flattened = layers.Dense(3)(layers.Flatten(name="flatten")(x))
    return keras.Model(inputs, [flattened, layers.Dense(2)(layers.GlobalMaxPooling2D()(x))])


def two_towers():
    """Two maps in one vector; neither tower loses its last feature."""
    a, b = keras.Input((5, 5, 1), name="a"), keras.Input((4, 4, 1), name="b")
    x = layers.Flatten(name="left")(layers.Conv2D(4, 3, name="conv_a")(a))
    y = layers.Flatten(name="right")(layers.Conv2D(3, 2, name="conv_b")(b))
    return keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([x, y])))


def joined(*parts):
    """One vector of flattened maps, units of a Dense layer, and input features."""
    inputs = keras.Input((5, 4, 2), name="x")
    left = layers.Conv2D(4, 3, activation="relu", name="conv_left")(inputs)
    right = layers.Conv2D(3, 2, name="conv_right")(inputs)
    pooled = layers.GlobalAveragePooling2D()(inputs)
    made = {
        "left": layers.Flatten(name="left")(left),
        "right": layers.Flatten(name="right")(right),
        "units": layers.Dense(5, activation="relu", name="units")(pooled),
        "raw": layers.Flatten(name="raw")(inputs),
    }
    x = layers.Concatenate()([made[part] for part in parts])
    return keras.Model(inputs, layers.Dense(2)(x))


def combined(merge):
    """Two flattened maps whose entries are united."""
    inputs = keras.Input((5, 4, 2))
    maps = (layers.Conv2D(4, 3, name=f"conv_{name}")(inputs) for name in ("left", "right"))
    left, right = (
        layers.Flatten(name=name)(x) for name, x in zip(("left", "right"), maps, strict=True)
    )
    return keras.Model(inputs, layers.Dense(3)(merge([left, right])))


def residual_head():
    """A branch that flattens a map: its Dense layer keeps a feature, for it is no mere branch."""
    inputs = keras.Input((4, 4, 2))
    x = layers.Dense(6, name="shortcut")(layers.GlobalAveragePooling2D()(inputs))
    y = layers.Conv2D(5, 3, activation="relu", name="second")(inputs)
    y = layers.Dense(6, name="branch")(layers.Flatten(name="flatten")(y))
    return keras.Model(inputs, layers.Dense(2)(layers.Add()([x, y])))


MODELS = {
    "flatten": lambda: chain(flat(), *head()),
    "channels untracked before": lambda: chain(flat(), *head(), activation="softmax"),
    "pooling": lambda: chain(layers.MaxPooling2D(2, padding="same"), flat(), *head()),
    "odd padding": lambda: chain(layers.ZeroPadding2D(((1, 0), (0, 2))), flat(), *head()),
    "one dimension": lambda: chain(flat(), *head(), shape=(9, 2)),
    "reshape": lambda: chain(layers.Reshape((75,), name="flatten"), *head()),
    "reshape to what is left": lambda: chain(layers.Reshape((-1,), name="flatten"), *head()),
    "operator": lambda: chain(
        layers.Activation("tanh"), lambda x: ops.reshape(x, (-1, 75)), *head()
    ),
    "transposed": lambda: chain(layers.Permute((3, 1, 2)), flat(), *head()),
    "dropout": lambda: chain(flat(), layers.Dropout(0.5), *head()),
    "activation behind": lambda: chain(flat(), layers.Activation("sigmoid"), *head()),
    "normalized before": lambda: chain(layers.BatchNormalization(), flat(), *head()),
    "normalized behind": lambda: chain(flat(), layers.BatchNormalization(), *head()),
    "layer norm behind": lambda: chain(flat(), layers.LayerNormalization(epsilon=0.1), *head()),
    "depthwise": lambda: chain(
        layers.DepthwiseConv2D(2, depth_multiplier=2, activation="relu"), flat(), *head()
    ),
    "two readers": lambda: readers(apart=False),
    "two readers apart": lambda: readers(apart=True),
    "read elsewhere": read_elsewhere,
    "two towers": two_towers,
    "residual": residual_head,
    "behind units": lambda: joined("units", "left"),
    "before units": lambda: joined("left", "units"),
    "behind and before input features": lambda: joined("right", "raw", "left"),
    "twice in a vector": lambda: joined("left", "left"),
    "sum": lambda: combined(layers.Add()),
    "product": lambda: combined(layers.Multiply()),
}


@pytest.mark.parametrize("case", MODELS)
def test_compact_equals_gated(case, assert_exact):
    gated = assert_exact(MODELS[case](), prune_features=True)
    channels = GatedNetwork(gated).channels
    assert len(channels.picked) == 1 + (case == "two readers apart")


def test_input_and_flattened_features_are_pruned_together(assert_exact):
    inputs = keras.Input((6,), name="x")
    x = layers.Reshape((6, 1))(layers.Dense(6, name="first")(inputs))
    x = layers.Flatten(name="flatten")(layers.Conv1D(3, 2, name="conv")(x))
    assert_exact(keras.Model(inputs, layers.Dense(2)(x)), prune_inputs=True, prune_features=True)


def test_a_flattened_input_is_an_input():
    model = keras.Sequential([keras.Input((4, 3)), flat(), *head()])
    with pytest.warns(UserWarning, match="changes nothing"):
        found = analyze(model, prune_features=True)
    assert {group.name for group in found.groups} == {"fc"}


@pytest.mark.parametrize(
    ("model", "makers", "size"),
    [
        (lambda: joined("left", "units"), ("left",), 24),
        (lambda: joined("units", "left"), ("left",), 24),
        (lambda: joined("raw", "left"), ("left",), 24),
        (lambda: joined("left", "raw", "right", "units"), ("left", "right"), 24 + 36),
        (lambda: joined("units", "right", "left"), ("right", "left"), 36 + 24),
        (lambda: combined(layers.Add()), ("left", "right"), 24),
    ],
)
def test_features_are_the_entries_of_maps_alone_whatever_stands_beside_them(model, makers, size):
    found = analyze(model(), prune_features=True)
    features = [group for group in found.groups if group.producers == makers]
    assert [group.size for group in features] == [size]
    of_groups = {name for group in found.groups for name in group.producers}
    assert "x" not in of_groups
    assert not of_groups & {frozen.layer for frozen in found.frozen}


def test_input_features_beside_flattened_ones_are_pruned_if_asked(assert_exact):
    model = joined("raw", "left", "units")
    assert_exact(model, prune_inputs=True, prune_features=True)
    groups = analyze(model, prune_inputs=True, prune_features=True).groups
    # What the convolution and the pooling read, and what is flattened as it is.
    assert [group.size for group in groups if "x" in group.producers] == [2, 2, 40]


def test_an_excluded_flattening_keeps_the_features_beside_it_together():
    found = analyze(joined("left", "right"), prune_features=True, exclude=["right"])
    assert {group.name for group in found.groups} == {"conv_left", "conv_right"}
    why = {frozen.layer: frozen.reason for frozen in found.frozen}
    assert why["left"] == why["right"] == reasons.EXCLUDED


def test_groups_of_features_have_one_name_in_all_tables():
    model = readers(apart=True)
    names = [[group.name for group in analyze(model, prune_features=True).groups]]
    network = GatedNetwork(insert_gates(model, prune_features=True))
    names.append([group.name for group in network.channels.groups])
    assert names[0] == names[1] == ["second", "flatten", "flatten:2"]


def test_a_model_without_flattened_maps_is_told_so():
    model = chain(layers.GlobalAveragePooling2D(), *head())
    with pytest.warns(UserWarning, match="prune_features=True changes nothing"):
        plain = analyze(model, prune_features=True)
    assert [group.name for group in plain.groups] == ["first", "second", "fc"]


@pytest.mark.parametrize("value", ["flatten", None, 1, ["flatten"]])
@pytest.mark.parametrize("argument", ["prune_features", "prune_inputs"])
def test_arguments_that_are_neither_true_nor_false_are_refused(argument, value):
    with pytest.raises(InvalidArgumentError, match=f"`{argument}` .* must be True or False"):
        insert_gates(MODELS["flatten"](), **{argument: value})


def gated_chain():
    model = MODELS["flatten"]()
    network = GatedNetwork(insert_gates(model, prune_features=True))
    groups = {group.name: group for group in network.channels.groups}
    assert {name: group.size for name, group in groups.items()} == {
        "first": 4,
        "second": 5,
        "flatten": 75,
        "fc": 6,
    }
    return network, groups


def shapes(network, closed):
    (bank,) = network.sources
    values = np.ones(bank.size)
    values[closed] = 0.0
    bank.set_values(values)
    small = compact(network.net)
    kept = network.kept_neurons()
    assert small.count_params() == network.cost.count("params", kept)
    assert small.count_params() == network.cost.count("params", values)
    return [small.get_layer(name).kernel.shape for name in ("second", "fc")]


def test_a_channel_goes_with_its_gate_or_with_its_last_feature():
    network, groups = gated_chain()
    second, flatten = groups["second"].start, groups["flatten"].start
    assert shapes(network, []) == [(3, 3, 4, 5), (75, 6)]
    assert shapes(network, [second + 1]) == [(3, 3, 4, 4), (60, 6)]
    of_channel = flatten + np.arange(15) * 5 + 2  # channels are the last axis of the map
    assert shapes(network, of_channel[:-1]) == [(3, 3, 4, 5), (61, 6)]
    assert shapes(network, of_channel) == [(3, 3, 4, 4), (60, 6)]
    # One feature of the channel that is gone, one of another.
    assert shapes(network, [second + 1, flatten + 1, flatten + 2]) == [(3, 3, 4, 4), (59, 6)]


def test_the_last_feature_of_a_layer_stays_and_so_does_its_channel():
    network, groups = gated_chain()
    everything = np.arange(network.num_gates)
    (bank,) = network.sources
    bank.set_values(np.zeros(bank.size))
    small = compact(network.net)
    assert small.get_layer("second").kernel.shape == (3, 3, 1, 1)
    assert small.get_layer("fc").kernel.shape == (1, 1)
    features = np.array(groups["flatten"].neurons)
    bank.set_values((~np.isin(everything, features)).astype(float))
    small = compact(network.net)
    assert small.get_layer("second").kernel.shape == (3, 3, 4, 1)
    assert small.get_layer("fc").kernel.shape == (1, 6)


def test_expected_costs_are_those_of_independent_gates():
    """C(p) is the mean of C over gates drawn with probabilities p, for it is linear in each."""
    inputs = keras.Input((2, 1))
    x = layers.Flatten()(layers.Conv1D(2, 1, use_bias=False, name="conv")(inputs))
    channels = analyze(keras.Model(inputs, layers.Dense(3, use_bias=False)(x)), prune_features=True)
    cost = CostModel(channels)
    assert channels.num_neurons == 2 + 4
    p = np.random.default_rng(0).uniform(size=6)
    expected = {"macs": 0.0, "params": 0.0}
    for number in range(2**6):
        gates = np.array([number >> k & 1 for k in range(6)])
        weight = np.prod(np.where(gates, p, 1 - p))
        conv, features = gates[:2], gates[2:].reshape(2, 2) * gates[:2]
        kept = conv * features.max(axis=0)
        expected["macs"] += weight * (2 * kept.sum() + 3 * features.sum())
        expected["params"] += weight * (kept.sum() + 3 * features.sum())
    for measure, value in expected.items():
        assert cost.exact(measure, p) == pytest.approx(value)
        assert float(cost.cost(measure, p)) == pytest.approx(value)


def test_features_are_frozen_with_the_reason_where_they_cannot_be_told_apart():
    def why(model, **options):
        found = analyze(model, prune_features=True, **options)
        assert not any("flatten" in group.name for group in found.groups)
        return {f.reason for f in found.frozen if "flatten" in f.layer}

    shared = layers.Dense(75, name="shared")
    assert why(chain(flat(), shared, shared, *head())) == {reasons.NOT_READ_BY_DENSE}
    gru = (layers.Reshape((75, 1)), layers.GRU(3), layers.Dense(2))
    assert why(chain(flat(), *gru)) == {reasons.NOT_READ_BY_DENSE}
    excluded = why(MODELS["flatten"](), exclude=["flatten"])
    assert excluded == {reasons.EXCLUDED}


def test_readers_make_up_for_removed_features():
    keras.utils.set_random_seed(0)
    model = chain(flat(), layers.Dense(3, name="logits"), shape=(6, 6, 1))
    gated = insert_gates(model, prune_features=True)
    (bank,) = GatedNetwork(gated).sources
    values = np.ones(bank.size)
    values[np.random.default_rng(0).choice(np.arange(9, bank.size), 30, replace=False)] = 0.0
    bank.set_values(values)
    x = np.random.default_rng(1).normal(size=(400, 6, 6, 1)).astype("float32")
    small = compact(gated)
    before = np.mean(np.square(model(x) - small(x)))
    (report,) = compensate(gated, small, x).layers
    assert (report.layer, report.removed, report.kept) == ("logits", 30, 50)
    assert np.mean(np.square(model(x) - small(x))) < 0.5 * before


def test_what_has_been_picked_can_be_pruned_again(assert_exact, tmp_path):
    network, groups = gated_chain()
    (bank,) = network.sources
    values = np.ones(bank.size)
    values[np.array(groups["flatten"].neurons)[1::2]] = 0.0
    bank.set_values(values)
    compact(network.net).save(tmp_path / "small.keras")
    small = keras.models.load_model(tmp_path / "small.keras")
    found = analyze(small, prune_features=True)
    sizes = {group.name: group.size for group in found.groups}
    assert sizes == {"first": 4, "second": 5, "flatten": 38, "fc": 6}
    assert_exact(small, prune_features=True)


def test_channels_that_are_picked_by_fixed_numbers_move_with_the_others(assert_exact):
    inputs = keras.Input((6,))
    x = layers.Dense(5, activation="relu", name="first")(inputs)
    picked = ops.take(x, [4, -5, 2, 2], axis=-1)
    model = keras.Model(inputs, [layers.Dense(2)(picked), layers.Dense(2)(x)])
    assert [group.size for group in analyze(model).groups] == [3, 2]
    assert_exact(model)


TAIL = st.lists(
    st.sampled_from(["pool", "pad", "batchnorm", "depthwise", "permute", "activation"]),
    max_size=3,
)
BEHIND = st.lists(st.sampled_from(["dropout", "batchnorm", "activation", "scale"]), max_size=2)


def random_network(shape, filters, tail, behind, num_readers, is_residual):
    inputs = keras.Input((*shape, 2))
    x = layers.Conv2D(filters, 2, padding="same", activation="sigmoid")(inputs)
    if is_residual:
        x = layers.Add()([x, layers.Conv2D(filters, 1, activation="relu")(x)])
    make = {
        "pool": lambda: layers.MaxPooling2D(2, padding="same"),
        "pad": lambda: layers.ZeroPadding2D(1),
        "batchnorm": lambda: layers.BatchNormalization(),
        "depthwise": lambda: layers.DepthwiseConv2D(2, padding="same", depth_multiplier=2),
        "permute": lambda: layers.Permute((2, 1, 3)),
        "activation": lambda: layers.Activation("softplus"),
        "dropout": lambda: layers.Dropout(0.3),
        "scale": lambda: lambda x: 0.5 - 2.0 * x,
    }
    for name in tail:
        x = make[name]()(x)
    x = layers.Flatten()(x)
    outputs = [layers.Dense(2)(x) for _ in range(num_readers - 1)]
    for name in behind:
        x = make[name]()(x)
    return keras.Model(inputs, [*outputs, layers.Dense(3)(layers.Dense(4)(x))])


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    filters=st.integers(2, 4),
    tail=TAIL,
    behind=BEHIND,
    num_readers=st.integers(1, 3),
    is_residual=st.booleans(),
    hard=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
def test_compact_equals_gated_on_random_networks(
    shape, filters, tail, behind, num_readers, is_residual, hard, share, seed
):
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = random_network(shape, filters, tail, behind, num_readers, is_residual)
    for weight in model.weights:
        if "seed" not in weight.path:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape) * rng.choice([-1, 1], weight.shape))
        if weight.path.endswith("moving_variance"):
            weight.assign(abs(weight))
    gated, x = insert_gates(model, prune_features=True), random_inputs(model, batch_size=4)
    assert parity_error(model(x, training=False), gated(x, training=False)) == 0
    network = GatedNetwork(gated)
    (bank,) = network.sources
    values = rng.uniform(0.2, 1.0, bank.size) * (rng.uniform(size=bank.size) < share)
    bank.set_values((values > 0).astype("float32") if hard else values)
    small = compact(gated, verify=False)
    assert parity_error(gated(x, training=False), small(x, training=False)) <= 1e-5
    kept = network.kept_neurons()
    assert small.count_params() == network.cost.count("params", kept)
    assert CostModel(analyze(small)).macs_dense == network.cost.count("macs", kept)
