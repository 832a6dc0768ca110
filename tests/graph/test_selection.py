"""`include` and `exclude`: what the caller allows to be pruned."""

from __future__ import annotations

import re

import keras
import pytest
from keras import layers

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import analyze, reasons
from tf_kfacprune.pruning import Budget
from tf_kfacprune.training import PrunableModel


def chain():
    return keras.Sequential(
        [
            keras.Input((5,), name="features"),
            layers.Dense(6, name="first"),
            layers.Dense(4, name="second"),
            layers.Dense(3, name="third"),
            layers.Dense(2, name="head"),
        ]
    )


def residual():
    inputs = keras.Input((5,))
    x = layers.Dense(6, name="stem")(inputs)
    y = layers.Dense(4, name="inner")(x)
    x = layers.Add()([x, layers.Dense(6, name="outer")(y)])
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def nested():
    inside = keras.Input((6,))
    body = keras.Model(inside, layers.Dense(4, name="deep")(layers.Dense(3, name="mid")(inside)))
    body.name = "backbone"
    inputs = keras.Input((5,))
    x = body(layers.Dense(6, name="stem")(inputs))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def groups(model, **kwargs):
    return [group.name for group in analyze(model, **kwargs).groups]


def why(model, **kwargs):
    return {record.layer: record.reason for record in analyze(model, **kwargs).frozen}


@pytest.mark.parametrize("entry", ["second", "sec.*", re.compile("s[a-z]+d"), "object"])
def test_only_included_layers_are_prunable(entry):
    model = chain()
    include = [model.get_layer("second") if entry == "object" else entry]
    assert groups(model, include=include) == ["second"]
    found = why(model, include=include)
    assert found["first"] == found["third"] == reasons.NOT_INCLUDED
    (bank,) = GatedNetwork(insert_gates(model, include=include)).sources
    assert bank.size == 4


def test_a_single_entry_needs_no_list():
    assert groups(chain(), include="third") == ["third"]
    assert groups(chain(), exclude="first") == ["second", "third"]


def test_exclude_wins_over_include():
    model = chain()
    assert groups(model, include=["first", "second"], exclude=["first"]) == ["second"]
    assert why(model, include=["first", "second"], exclude=["first"])["first"] == reasons.EXCLUDED


def test_coupled_layers_must_all_be_included():
    assert groups(residual(), include=["stem"]) == []
    assert groups(residual(), include=["stem", "outer"]) == ["stem"]
    assert why(residual(), include=["stem"])["stem"] == reasons.NOT_INCLUDED


def test_included_inputs_are_pruned_only_with_prune_inputs():
    assert groups(chain(), include=["features", "first"]) == ["first"]
    assert groups(chain(), include=["features"], prune_inputs=True) == ["features"]


def test_the_name_of_a_nested_model_stands_for_all_its_layers():
    assert groups(nested(), include=["backbone"]) == ["backbone/mid", "backbone/deep"]
    assert groups(nested(), include=["backbone/mid"]) == ["backbone/mid"]
    assert groups(nested(), exclude=["backbone"]) == ["stem"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("entry", ["frist", re.compile("x.*"), layers.Dense(3)])
def test_entries_that_match_nothing_are_refused(argument, entry):
    with pytest.raises(InvalidArgumentError, match=f"`{argument}` names no layer"):
        analyze(chain(), **{argument: [entry]})


def test_prunable_models_take_both_and_refuse_them_for_models_with_gates():
    pm = PrunableModel(chain(), Budget(macs=0.9), include=["first", "second"], exclude=["second"])
    assert [group.name for group in pm.gated.channels.groups] == ["first"]
    with pytest.raises(InvalidArgumentError, match=r"include=\['first'\]"):
        PrunableModel(pm.net, Budget(macs=0.9), include=["first"])
