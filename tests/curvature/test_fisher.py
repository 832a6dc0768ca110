"""Sampled likelihoods have the Gauss-Newton matrix of their loss as Fisher."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import exact_likelihoods, sampled_likelihood
from tf_kfacprune.errors import InvalidArgumentError

DRAWS = 40_000


def _fisher_of_outputs(likelihood, outputs):
    """E[g g^T] with respect to the outputs of one example, over many draws."""
    batch = tf.constant(np.repeat(outputs[None], DRAWS, axis=0), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(batch)
        nll = likelihood(batch, keras.random.SeedGenerator(0))
    g = np.array(tape.gradient(nll, batch), "float64") * DRAWS
    return g.T @ g / DRAWS


def _hessian_of_loss(loss, outputs, label):
    x = tf.constant(outputs[None], tf.float32)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = loss(label, x)
        gradient = inner.gradient(value, x)
    return np.array(outer.jacobian(gradient, x), "float64")[0, :, 0, :]


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), [1]),
        (keras.losses.CategoricalCrossentropy(from_logits=True), [[0.0, 1.0, 0.0]]),
        (keras.losses.BinaryCrossentropy(from_logits=True), [[0.0, 1.0, 0.0]]),
        (keras.losses.MeanSquaredError(), [[0.3, 0.2, 0.1]]),
    ],
    ids=lambda p: type(p).__name__,
)
def test_fisher_equals_the_hessian_of_the_loss_in_the_outputs(loss, label):
    outputs = np.array([0.5, -0.3, 1.0])
    fisher = _fisher_of_outputs(sampled_likelihood(loss), outputs)
    expected = _hessian_of_loss(loss, outputs, np.array(label))
    np.testing.assert_allclose(fisher, expected, atol=6 / np.sqrt(DRAWS))


def test_probabilities_and_logits_give_the_same_fisher():
    logits = np.array([0.5, -0.3, 1.0])
    p = np.exp(logits) / np.exp(logits).sum()
    by_probability = _fisher_of_outputs(sampled_likelihood("categorical_crossentropy"), p)
    jacobian = np.diag(p) - np.outer(p, p)
    expected = np.diag(p) - np.outer(p, p)
    np.testing.assert_allclose(
        jacobian @ by_probability @ jacobian, expected, atol=6 / np.sqrt(DRAWS)
    )


def test_a_loss_without_a_known_likelihood_is_named():
    assert "hinge" in sampled_likelihood("hinge")


def test_names_functions_and_objects_mean_the_same_loss():
    name = "sparse_categorical_crossentropy"
    by_name = sampled_likelihood(name)
    assert by_name is sampled_likelihood(keras.losses.get(name))
    assert by_name is sampled_likelihood(keras.losses.SparseCategoricalCrossentropy())


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), [1]),
        (keras.losses.BinaryCrossentropy(from_logits=True), [[0.0, 1.0, 0.0]]),
        (keras.losses.MeanSquaredError(), [[0.3, 0.2, 0.1]]),
    ],
    ids=lambda p: type(p).__name__,
)
def test_exact_likelihoods_add_up_to_the_hessian_of_the_loss(loss, label):
    outputs = np.array([0.5, -0.3, 1.0])
    expected = _hessian_of_loss(loss, outputs, np.array(label))
    np.testing.assert_allclose(_exact_fisher(loss, outputs), expected, rtol=1e-4, atol=1e-7)


def _exact_fisher(loss, outputs):
    batch = tf.constant(outputs[None], tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(batch)
        terms = exact_likelihoods(loss)(batch)
    rows = np.concatenate([np.array(tape.gradient(term, batch), "float64") for term in terms])
    return rows.T @ rows


def test_fisher_of_a_poisson_rate_is_one_over_the_rate():
    rates = np.array([0.5, 2.0, 5.0])
    expected = np.diag(1 / rates) / 3
    np.testing.assert_allclose(_exact_fisher("poisson", rates), expected, rtol=1e-5, atol=1e-7)
    sampled = _fisher_of_outputs(sampled_likelihood(keras.losses.Poisson()), rates)
    np.testing.assert_allclose(sampled, expected, atol=6 / np.sqrt(DRAWS))


def test_exact_likelihoods_from_probabilities_are_those_of_the_logits():
    logits = np.array([0.5, -0.3, 1.0])
    p = np.exp(logits) / np.exp(logits).sum()
    jacobian = np.diag(p) - np.outer(p, p)
    fisher = jacobian @ _exact_fisher("categorical_crossentropy", p) @ jacobian
    np.testing.assert_allclose(fisher, jacobian, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 300), (2, 3, 4)])
def test_exact_likelihoods_refuse_outputs_that_would_take_too_many_passes(shape):
    with pytest.raises(InvalidArgumentError, match="labels='sampled'"):
        exact_likelihoods("mean_squared_error")(tf.zeros(shape))
