"""Landing on budgets from 50 % to 2 %, on networks of the zoo, whatever the scores are."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune import zoo
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.pruning import GateGroups, land_on_budget

TARGETS = (0.5, 0.2, 0.1, 0.05, 0.02)
# Multiples of 8 leave a small network so few choices that not every budget can be used up.
LEAST_USED = {None: 0.95, 8: 0.85}


@functools.cache
def network(name, round_to):
    model = zoo.build(name, (784,) if name == "lenet300" else None)
    gated = GatedNetwork(insert_gates(model, prune_inputs=name == "lenet300"))
    return gated, GateGroups(gated, round_to)


@functools.cache
def landing(name, round_to, measure):
    gated, groups = network(name, round_to)

    def fraction(measure, keep):
        return gated.cost.fraction(measure, gated.openness(tf.cast(keep, "float64")))

    @tf.function
    def land(scores, target):
        return land_on_budget(scores, groups.of_gate, groups.counts, fraction, {measure: target})

    return land


def draws(groups):
    """Scores without any order, and scores by which whole layers differ."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        plain = rng.normal(size=len(groups.of_gate))
        of_layer = rng.normal(size=len(groups.counts))[groups.of_gate]
        yield plain
        yield 0.3 * plain + of_layer


@pytest.mark.parametrize("round_to", [None, 8])
@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize(
    "name", ["lenet300", "lenet5", pytest.param("resnet20", marks=pytest.mark.slow)]
)
def test_every_budget_is_obeyed_and_used_up(name, measure, round_to):
    gated, groups = network(name, round_to)
    least = gated.cost.least(measure, groups.least)
    reachable = [target for target in TARGETS if target >= 1.5 * least]
    assert len(reachable) >= (5 if round_to is None else 2)
    for target in reachable:
        for scores in draws(groups):
            keep = landing(name, round_to, measure)(
                tf.constant(scores, tf.float32), tf.constant(target, tf.float64)
            )
            count = gated.cost.count(measure, gated.openness(keep))
            assert count <= target * gated.cost.dense(measure)
            assert count >= LEAST_USED[round_to] * target * gated.cost.dense(measure)


def test_of_several_bounds_the_tightest_is_used_up_and_none_broken():
    gated, groups = network("lenet5", None)
    targets = {"macs": 0.1, "params": 0.1, "bytes": 0.2}

    def fraction(measure, keep):
        return gated.cost.fraction(measure, gated.openness(tf.cast(keep, "float64")))

    @tf.function
    def land(scores):
        return land_on_budget(scores, groups.of_gate, groups.counts, fraction, targets)

    for scores in draws(groups):
        openness = gated.openness(land(tf.constant(scores, tf.float32)))
        loads = [
            gated.cost.exact(measure, openness) / (target * gated.cost.dense(measure))
            for measure, target in targets.items()
        ]
        assert 0.95 <= max(loads) <= 1.0 + 1e-12
