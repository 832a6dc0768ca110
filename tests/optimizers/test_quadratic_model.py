"""Step size and momentum against the exact minimizer in float64."""

import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.optimizers.quadratic_model import (
    QuadraticModel,
    best_coefficients,
    model_change,
)


def _model(seed):
    root = np.random.default_rng(seed).normal(size=(4, 2))
    return root.T @ root, np.random.default_rng(seed + 1).normal(size=2)


def _best(k, b):
    return best_coefficients(tf.constant(k, tf.float32), tf.constant(b, tf.float32))


@pytest.mark.parametrize("seed", range(4))
def test_coefficients_minimize_the_model(seed):
    k, b = _model(seed)
    c = _best(k, b)
    np.testing.assert_allclose(np.array(c), np.linalg.solve(k, b), rtol=1e-4)
    change = model_change(tf.constant(k, tf.float32), tf.constant(b, tf.float32), c)
    np.testing.assert_allclose(float(change), -0.5 * b @ np.linalg.solve(k, b), rtol=1e-4)


def test_without_momentum_the_gradient_step_is_as_long_as_the_model_says():
    np.testing.assert_allclose(np.array(_best([[4.0]], [2.0])), [0.5])
    np.testing.assert_array_equal(np.array(_best([[-1.0]], [2.0])), [0.0])


def test_without_a_previous_step_the_gradient_step_is_best_alone():
    np.testing.assert_allclose(np.array(_best([[4.0, 0.0], [0.0, 0.0]], [2.0, 0.0])), [0.5, 0.0])


def test_parallel_directions_count_as_one():
    np.testing.assert_allclose(np.array(_best([[4.0, 8.0], [8.0, 16.0]], [2.0, 4.0])), [0.5, 0.0])


@pytest.mark.parametrize("entry", [0.0, -1.0, np.nan, np.inf])
def test_a_model_that_is_not_convex_gives_no_step(entry):
    k = [[entry, 0.0], [0.0, 0.0]]
    np.testing.assert_array_equal(np.array(_best(k, [1.0, 0.0])), [0.0, 0.0])


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_a_penalty_costs_at_most_half_of_what_the_loss_gains(size):
    k, b = _model(0)
    q = size * np.random.default_rng(9).normal(size=2)
    gain, cost = (v @ np.linalg.solve(k, v) for v in (b, q))
    t = min(1.0, np.sqrt(0.5 * gain / cost))
    assert (t < 1) == (size > 1)
    model = QuadraticModel(*(tf.constant(v, tf.float32) for v in (k, b, q)))
    c = model.coefficients()
    np.testing.assert_allclose(np.array(c), np.linalg.solve(k, b + t * q), rtol=1e-4)
    # Its gain is that of the loss, whatever the penalty gains beside.
    np.testing.assert_allclose(float(model.change(c)), 0.5 * (t**2 * cost - gain), rtol=1e-4)
    assert float(model.change(c)) <= -0.2499 * gain
