"""Sampled likelihoods have the Gauss-Newton matrix of their loss as Fisher."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import sampled_likelihood

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
