"""Channel counts of the compact network: multiples, minima, and what they cost."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from tf_kfacprune.compaction import compact
from tf_kfacprune.errors import BudgetError, InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork, NeuronGate, insert_gates
from tf_kfacprune.pruning import Budget, GateGroups, OpenCounts
from tf_kfacprune.training import PrunableModel


def chain(*units):
    dense = [layers.Dense(n, activation="relu", name=f"fc{k}") for k, n in enumerate(units)]
    return keras.Sequential([keras.Input((20,)), *dense, layers.Dense(3, name="head")])


def concatenated():
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(12, 3, name="a")(inputs)
    b = layers.Conv2D(12, 3, name="b")(inputs)
    x = layers.Conv2D(16, 3, groups=2, name="grouped")(layers.Concatenate()([a, b]))
    x = layers.Flatten()(layers.Conv2D(9, 1, name="last")(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def counts(model, **kwargs):
    gated = GatedNetwork(insert_gates(model))
    groups = GateGroups(gated, **kwargs)
    return {g.name: c for g, c in zip(gated.channels.groups, groups.counts, strict=True)}


def landed(model, budget, seed=0, **kwargs):
    """A prunable model with random logits, landed as at the end of its pruning phase."""
    pm = PrunableModel(model, budget, **kwargs)
    rng = np.random.default_rng(seed)
    for parameters in pm.controller.gate_parameters:
        parameters.assign(rng.normal(size=parameters.shape))
    pm.controller.land()
    return pm


def test_without_arguments_one_neuron_is_the_least():
    assert counts(chain(9, 4)) == {"fc0": OpenCounts(9), "fc1": OpenCounts(4)}


def test_multiples_and_minima():
    assert counts(chain(30, 9), round_to=8) == {
        "fc0": OpenCounts(30, 8, 8),
        "fc1": OpenCounts(9, 8, 8),
    }
    assert counts(chain(30, 9), min_channels=5) == {
        "fc0": OpenCounts(30, 5),
        "fc1": OpenCounts(9, 5),
    }
    assert counts(chain(30, 12), round_to=4, min_channels=9) == {
        "fc0": OpenCounts(30, 12, 4),
        "fc1": OpenCounts(12, 12, 4),
    }


def test_groups_too_small_for_a_multiple_stay_whole_with_a_warning():
    with pytest.warns(UserWarning, match="round_to=8.* stay whole: fc1"):
        found = counts(chain(30, 6), round_to=8)
    assert found["fc1"] == OpenCounts(6, 6)
    with pytest.warns(UserWarning, match="stay whole: fc1"):  # 16 would be needed, 12 are there
        assert counts(chain(30, 12), round_to=8, min_channels=9)["fc1"] == OpenCounts(12, 12)


def test_neurons_of_several_channels_count_as_many():
    found = counts(concatenated(), round_to=8)
    assert found["grouped"] == OpenCounts(8, 4, 4)  # a neuron is one filter in each of 2 groups


def test_attention_heads_are_not_rounded_but_their_dimensions_are():
    x = keras.Input((5, 12))
    y = layers.MultiHeadAttention(6, 16, name="att")(x, x)
    found = counts(keras.Model(x, layers.Dense(2)(y)), round_to=8)
    assert found["att:heads"] == OpenCounts(6)
    assert found["att:value_dim"] == OpenCounts(16, 8, 8)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    units=st.lists(st.integers(4, 40), min_size=1, max_size=3),
    round_to=st.sampled_from([None, 2, 4]),
    min_channels=st.sampled_from([None, 1, 3, 4]),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
def test_landed_networks_keep_all_promises(units, round_to, min_channels, share, seed):
    gated = GatedNetwork(insert_gates(chain(*units)))
    limits = {"round_to": round_to, "min_channels": min_channels}
    least = gated.cost.least("params", GateGroups(gated, **limits).least)
    target = least + share * (1 - least)
    pm = landed(chain(*units), Budget(params=min(target + 1e-4, 1.0)), seed, **limits)
    small = compact(pm)
    left = [layer.units for layer in small.layers if hasattr(layer, "units")][:-1]
    for before, after in zip(units, left, strict=True):
        assert after % (round_to or 1) == 0
        assert after >= min(before, min_channels or 1)
    assert small.count_params() <= pm.budget.params * chain(*units).count_params() + 1e-6


def test_layers_of_concatenated_and_grouped_channels_are_rounded():
    pm = landed(concatenated(), Budget(macs=0.5), round_to=4)
    small = compact(pm)
    filters = {x.name: x.filters for x in small.layers if hasattr(x, "filters")}
    assert all(count % 4 == 0 for count in filters.values())
    assert small.get_layer("grouped").kernel.shape[2] * 2 == filters["a"] + filters["b"]


def test_the_budget_error_reckons_with_them():
    free = GatedNetwork(insert_gates(chain(30, 30))).cost.least("params")
    budget = Budget(params=free * 1.5)
    PrunableModel(chain(30, 30), budget)
    with pytest.raises(BudgetError, match="round_to=8 and min_channels=None"):
        PrunableModel(chain(30, 30), budget, round_to=8)
    with pytest.raises(BudgetError, match="round_to=None and min_channels=12"):
        PrunableModel(chain(30, 30), budget, min_channels=12)


@pytest.mark.parametrize("value", [0, -4, 2.0, True, "8"])
@pytest.mark.parametrize("argument", ["round_to", "min_channels"])
def test_only_positive_integers_are_taken(argument, value):
    with pytest.raises(InvalidArgumentError, match=argument):
        PrunableModel(chain(30), Budget(macs=0.5), **{argument: value})


def test_both_survive_saving(tmp_path):
    pm = PrunableModel(chain(30), Budget(macs=0.5), round_to=4, min_channels=8)
    pm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert (loaded.round_to, loaded.min_channels) == (4, 8)
    rng = np.random.default_rng(0)
    loaded.controller.gate_parameters[0].assign(rng.normal(size=30))
    loaded.controller.land()
    assert loaded.gated.kept_neurons().sum() in (8, 12)


def test_gates_that_can_remove_nothing_are_not_closed():
    inputs = keras.Input((20,))
    x = NeuronGate(name="idle")(layers.Softmax()(layers.Dense(6, name="mixed")(inputs)))
    x = NeuronGate(name="useful")(layers.Dense(12, activation="relu", name="fc")(x))
    net = keras.Model(inputs, layers.Dense(2)(x))
    pm = PrunableModel(net, Budget(params=0.8))
    rng = np.random.default_rng(0)
    for parameters in pm.controller.gate_parameters:
        parameters.assign(rng.normal(size=parameters.shape))
    pm.controller.land()
    idle, useful = (np.array(source.keep) for source in pm.gated.sources)
    assert idle.all()
    assert not useful.all()


def test_models_with_several_gates_per_neuron_cannot_be_rounded():
    inputs = keras.Input((20,))
    x = layers.Dense(12, name="fc")(inputs)
    heads = [layers.Dense(2)(NeuronGate(name=f"gate{k}")(x)) for k in range(2)]
    net = keras.Model(inputs, heads)
    PrunableModel(net, Budget(macs=0.5))
    with pytest.raises(InvalidArgumentError, match="several gates"):
        PrunableModel(net, Budget(macs=0.5), round_to=4)
