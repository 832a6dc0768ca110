"""Landing with flattened features as neurons: what is counted is what compaction leaves."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError

POLICIES = ["kfac", "taylor", "magnitude", "random", "hard_concrete", "proximal"]


def network():
    inputs = keras.Input((12, 10, 1))
    x = layers.Conv2D(5, 3, activation="relu", name="first")(inputs)
    x = layers.Conv2D(6, 3, activation="relu", name="second")(layers.MaxPooling2D()(x))
    x = layers.Dense(12, activation="relu", name="fc")(layers.Flatten(name="flatten")(x))
    return keras.Model(inputs, layers.Dense(3, name="logits")(x))


def two_towers():
    a, b = keras.Input((5, 5, 1), name="a"), keras.Input((4, 4, 1), name="b")
    x = layers.Flatten(name="left")(layers.Conv2D(4, 3, name="conv_a")(a))
    y = layers.Flatten(name="right")(layers.Conv2D(3, 2, name="conv_b")(b))
    return keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([x, y])))


@functools.cache
def landing(build, measure):
    model = kp.PrunableModel(build(), kp.Budget(**{measure: 0.9}), prune_features=True)
    task = model.controller._task

    @tf.function
    def land(scores, target):
        return task.keep_within({measure: target}, scores)

    return model, task, land


@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
@pytest.mark.parametrize("build", [network, two_towers])
def test_budgets_are_obeyed_exactly_whatever_the_scores_are(build, measure):
    model, task, land = landing(build, measure)
    cost, (bank,) = model.gated.cost, model.gated.sources
    least = cost.least(measure, task.groups.least)
    for seed, target in enumerate([least + 1e-9, 1.3 * least, 0.3, 0.5, 0.8]):
        target = max(target, least + 1e-9)
        rng = np.random.default_rng(seed)
        plain = rng.normal(size=bank.size)
        of_group = rng.normal(size=len(task.groups.counts))[task.groups.of_gate]
        for scores in (plain, plain + 3 * of_group):
            keep = land(tf.constant(scores, tf.float32), tf.constant(target, tf.float64)).numpy()
            bank.set_values(keep)
            kept = model.gated.kept_neurons()
            assert cost.exact(measure, keep) == cost.exact(measure, kept)
            assert cost.exact(measure, kept) <= target * cost.dense(measure) + 1e-6
    small = kp.compact(model.net)
    assert small.count_params() == cost.count("params", keep)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_lands_on_its_budget(policy):
    keras.utils.set_random_seed(0)
    model = kp.PrunableModel(
        network(),
        kp.Budget(params=0.2),
        prune_features=True,
        policy=policy,
        phases=kp.Phases(0.2, 0.6),
        seed=0,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss=loss, run_eagerly=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(48, 12, 10, 1)).astype("float32"), rng.integers(0, 3, 48)
    model.fit(x, y, batch_size=8, verbose=0)
    small = kp.compact(model)
    dense = network().count_params()
    assert 0.18 * dense < small.count_params() <= 0.2 * dense
    outcome = model.budget_outcomes()["params"]
    assert outcome.achieved == pytest.approx(small.count_params() / dense)


def test_channels_save_their_features_and_last_features_their_channel():
    model, *_ = landing(network, "params")
    groups = {group.name: np.array(group.neurons) for group in model.gated.channels.groups}
    openness = tf.Variable(np.ones(model.gated.channels.num_neurons))
    of_channel = groups["flatten"][np.arange(6) * 6 + 1]  # six positions of six channels

    def saved():
        with tf.GradientTape() as tape:
            cost = model.gated.cost.cost("params", openness)
        return tape.gradient(cost, openness).numpy()

    channel = groups["second"][1]
    conv = 9 * 5 + 1
    assert saved()[channel] == pytest.approx(conv + 6 * 12)
    assert saved()[of_channel] == pytest.approx(12)
    openness.assign(1.0 - np.isin(np.arange(openness.shape[0]), of_channel[1:]))
    assert saved()[channel] == pytest.approx(conv + 12)
    assert saved()[of_channel[0]] == pytest.approx(conv + 12)


@pytest.mark.parametrize("arguments", [{"round_to": 4}, {"min_channels": 2}])
def test_channel_counts_that_cannot_be_kept_are_refused(arguments):
    with pytest.raises(InvalidArgumentError, match="prune_features=True"):
        kp.PrunableModel(network(), kp.Budget(macs=0.5), prune_features=True, **arguments)
