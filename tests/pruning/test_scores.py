"""Scores of gates: what a neuron is worth per cost, above and below zero; where b comes from."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_kfacprune as kp

to_numpy = keras.ops.convert_to_numpy


def _pruning(policy, macs=0.5):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((10,))
    x = layers.Dense(6, activation="tanh", name="first")(inputs)
    x = layers.Dense(5, activation="tanh", name="second")(x)
    net = keras.Model(inputs, layers.Dense(3, name="head")(x))
    phases = kp.Phases(0.0, 0.5)
    model = kp.PrunableModel(net, kp.Budget(macs=macs), policy=policy, phases=phases, seed=0)
    model.controller.schedule(20, None)
    model.controller.enter_due_phase()
    return model


DENSE_MACS = 10 * 6 + 6 * 5 + 5 * 3
SAVED = np.repeat([10 + 5, 6 + 3], [6, 5]) / DENSE_MACS / 0.5


def _with_worth(model, worth):
    of = model.controller.policy.criterion.worth
    of.total.assign(worth)
    of.weight.assign(1.0)


def test_a_score_is_worth_per_cost_above_zero_and_worth_times_cost_below():
    model = _pruning("kfac")
    worth = np.random.default_rng(0).normal(size=11).astype("float32")
    assert (worth > 0).any()
    assert (worth < 0).any()
    _with_worth(model, worth)
    expected = np.where(worth > 0, worth / SAVED, worth * SAVED)
    np.testing.assert_allclose(to_numpy(model.controller.policy.scores()), expected, rtol=1e-5)


@pytest.mark.parametrize("worth", [-1.0, 0.5])
def test_of_two_neurons_equally_worth_the_dearer_one_goes_first(worth):
    model = _pruning("kfac")
    _with_worth(model, np.full(11, worth, "float32"))
    scores = to_numpy(model.controller.policy.scores())
    assert scores[:6].max() < scores[6:].min()  # a neuron of the first layer saves 15, else 9


def test_harmful_neurons_go_before_useful_ones_whatever_they_cost():
    model = _pruning("kfac", macs=47.5 / DENSE_MACS)  # room for 4 x 10 + 4 + 3
    worth = np.full(11, 1e-6, "float32")
    worth[6:] = -1e-6  # the cheap ones
    _with_worth(model, worth)
    model.controller.land()
    kept = model.gated.gate_values() > 0
    assert kept[6:].sum() == 1  # the least
    assert kept[:6].sum() == 4


def test_b_is_minus_g_plus_half_the_curvature_from_both_sides():
    model = _pruning(kp.KFACSaliency(every=1000))
    policy = model.controller.policy
    curvature = np.arange(1.0, 12.0, dtype="float32")
    policy.criterion.curvature.total.assign(curvature)
    policy.criterion.curvature.weight.assign(1.0)
    z = np.array([0.0, 1.0] * 5 + [0.0], "float32")
    (parameters,) = model.controller.gate_parameters
    parameters.assign(z)
    g = np.linspace(-1, 1, 11).astype("float32")
    policy.move([tf.constant(g)], tf.constant(0.0), tf.constant(10.0))
    np.testing.assert_allclose(
        to_numpy(policy.criterion.worth.value()), -g + (z - 0.5) * curvature, rtol=1e-5
    )


def test_gradient_and_curvature_of_a_score_are_both_of_the_training_mode():
    """Behind a normalization whose moving statistics are far off, in float64 NumPy."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, name="hidden")
    norm = layers.BatchNormalization(name="norm")
    head = layers.Dense(3, name="head")
    net = keras.Model(inputs, head(layers.ReLU()(norm(hidden(inputs)))))
    norm.moving_mean.assign(np.full(5, 3.0))
    policy = kp.KFACSaliency(every=1000, labels="exact", batch_fraction=1)
    arguments = {"policy": policy, "phases": kp.Phases(0.0, 0.5), "seed": 0}
    model = kp.PrunableModel(net, kp.Budget(macs=0.5), **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    model.plan_phases(10)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4)).astype("float32"), np.arange(16) % 3
    w, v, c = (to_numpy(t).astype("float64") for t in (hidden.kernel, head.kernel, head.bias))
    s = x.astype("float64") @ w + to_numpy(hidden.bias)
    a = np.maximum((s - s.mean(0)) / np.sqrt(s.var(0) + norm.epsilon), 0.0)
    p = np.exp(a @ v + c)
    p /= p.sum(1, keepdims=True)
    fisher = (p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]).mean(0)
    curvature = (a**2).mean(0) * np.einsum("jk,kl,jl->j", v, fisher, v)
    gradient = np.mean(a * ((p - np.eye(3)[y]) @ v.T), axis=0)
    model.train_on_batch(x, y)
    criterion = model.controller.policy.criterion
    np.testing.assert_allclose(to_numpy(criterion.curvature.value()), curvature, rtol=1e-4)
    np.testing.assert_allclose(
        to_numpy(criterion.worth.value()), -gradient + 0.5 * curvature, rtol=1e-3, atol=1e-5
    )
