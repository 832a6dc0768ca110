"""Coordinates of likelihoods: their Fisher in float64, and derivatives that stay finite."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import Likelihood, likelihood_of

losses = keras.losses
LOGITS = np.array([0.5, -0.3, 1.0])
SOFTMAX = np.exp(LOGITS) / np.exp(LOGITS).sum()
RATES = np.array([0.5, 2.0, 5.0])

# name -> (loss, predictions, Fisher of one entry, where the loss adds up its outputs)
FISHER = {
    "logits": (
        losses.CategoricalCrossentropy(from_logits=True),
        LOGITS,
        np.diag(SOFTMAX) - np.outer(SOFTMAX, SOFTMAX),
    ),
    "sparse logits": (
        losses.SparseCategoricalCrossentropy(from_logits=True),
        LOGITS,
        np.diag(SOFTMAX) - np.outer(SOFTMAX, SOFTMAX),
    ),
    # log (p_y / sum p) has the gradient e_y / p_y - 1.
    "probabilities": ("categorical_crossentropy", SOFTMAX, np.diag(1 / SOFTMAX) - 1),
    "log odds": (
        losses.BinaryCrossentropy(from_logits=True),
        LOGITS,
        np.diag(1 / (2 + np.exp(LOGITS) + np.exp(-LOGITS))),
    ),
    "Bernoulli": ("binary_crossentropy", SOFTMAX, np.diag(1 / (SOFTMAX * (1 - SOFTMAX)))),
    "squares": ("mse", LOGITS, 2 * np.eye(3)),
    "rates": ("poisson", RATES, np.diag(1 / RATES)),
}


def derivatives(function, point):
    """Value, Jacobian and second derivatives of each coordinate along each direction."""
    point = tf.constant(point)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(point)
        with tf.GradientTape(persistent=True) as inner:
            inner.watch(point)
            value = function(point)
            parts = [value[k] for k in range(value.shape[0])]
        rows = [inner.gradient(part, point) for part in parts]
    second = [outer.jacobian(row, point, experimental_use_pfor=False) for row in rows]
    second = [tf.zeros((len(rows), len(rows)), point.dtype) if s is None else s for s in second]
    return np.array(value), np.array(tf.stack(rows)), np.array(tf.stack(second))


@pytest.mark.parametrize("name", FISHER)
def test_the_metric_of_the_coordinates_is_the_fisher(name):
    loss, point, fisher = FISHER[name]
    likelihood = likelihood_of(loss)
    _, jacobian, _ = derivatives(likelihood.coordinates, point)
    assert jacobian.dtype == np.float64
    np.testing.assert_allclose(jacobian.T @ jacobian, fisher, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", FISHER)
def test_a_loss_is_a_mean_over_outputs_or_a_sum(name):
    assert likelihood_of(FISHER[name][0]).is_mean == (name not in list(FISHER)[:3])


EXTREMES = {
    "logits": [[1e4, -1e4, 0.0], [-1e30, 0.0, 1e30], [88.0, -88.0, 89.0], [0.0, 0.0, 0.0]],
    "log odds": [[1e4, -1e4, 0.0], [1e30, -1e30, 17.0], [88.0, -88.0, 104.0]],
    "probabilities": [[1.0, 0.0, 0.0], [1e-38, 1.0, 1e-8], [0.5, 0.5, 1e-7]],
    "Bernoulli": [[1.0, 0.0, 0.5], [1e-38, 1.0 - 6e-8, 1e-7]],
    "squares": [[1e18, -1e18, 0.0]],
    "rates": [[0.0, 1e-38, 1e18], [-1.0, 1e-7, 1.0]],
}


@pytest.mark.parametrize(
    ("name", "point"), [(name, point) for name, points in EXTREMES.items() for point in points]
)
def test_values_and_two_derivatives_are_finite_in_float32(name, point):
    likelihood = likelihood_of(FISHER[name][0])
    for found in derivatives(likelihood.coordinates, np.array(point, "float32")):
        assert found.dtype == np.float32
        assert np.isfinite(found).all()


@pytest.mark.parametrize("name", ["logits", "log odds"])
def test_derivatives_in_float32_are_those_in_float64_where_predictions_saturate(name):
    coordinates = likelihood_of(FISHER[name][0]).coordinates
    point = np.array([12.0, -9.0, 0.3])
    narrow = derivatives(coordinates, point.astype("float32"))
    for found, expected in zip(narrow, derivatives(coordinates, point), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-7)


def test_names_functions_and_objects_mean_the_same():
    name = "sparse_categorical_crossentropy"
    by_name = likelihood_of(name)
    assert isinstance(by_name, Likelihood)
    assert by_name is likelihood_of(losses.get(name))
    assert by_name is likelihood_of(losses.SparseCategoricalCrossentropy())
    assert by_name is likelihood_of(losses.CategoricalCrossentropy(label_smoothing=0.1))
    assert by_name is not likelihood_of(losses.SparseCategoricalCrossentropy(from_logits=True))


def mean_squared_error(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred), axis=-1)


class Scaled(losses.MeanSquaredError):
    def call(self, y_true, y_pred):
        return 3.0 * super().call(y_true, y_pred)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("hinge", "loss 'hinge' has no known likelihood"),
        (losses.Huber(), "no known likelihood"),
        (lambda y, f: y - f, "no known likelihood"),
        (mean_squared_error, "is not the function of that name in Keras"),
        (Scaled(), "loss 'Scaled' has a `call` of its own"),
        (losses.CategoricalCrossentropy(axis=1), "classes on axis 1"),
        (functools.partial(losses.binary_crossentropy, from_logits=True), "no known likelihood"),
    ],
    ids=["name", "object", "lambda", "same name", "subclass", "axis", "partial"],
)
def test_what_is_not_known_is_not_guessed(loss, reason):
    assert reason in likelihood_of(loss)
