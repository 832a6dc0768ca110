"""SAM and ASAM of the benchmarks: one step each against NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest

RHO, RATE = 0.3, 0.1


@pytest.fixture(name="sharpness_aware", scope="module")
def benchmark(load_benchmark):
    return load_benchmark("sharpness_aware")


def _gradients(x, y, kernel, bias):
    """Of the mean of squares, by kernel and bias."""
    error = 2 * (x @ kernel + bias - y) / y.size
    return x.T @ error, error.sum(0)


@pytest.mark.parametrize("is_adaptive", [False, True], ids=["sam", "asam"])
def test_a_step_takes_the_gradient_where_the_loss_is_worst_nearby(sharpness_aware, is_adaptive):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    kernel, bias = rng.normal(size=(3, 2)), rng.normal(size=2)
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    net.set_weights([kernel, bias])
    model = sharpness_aware.SharpnessAware(net, RHO, is_adaptive=is_adaptive)
    model.compile(keras.optimizers.SGD(RATE), "mse", run_eagerly=True)
    model.train_on_batch(x.astype("float32"), y.astype("float32"))

    g_kernel, g_bias = _gradients(x, y, kernel, bias)
    scale = np.abs(kernel) + 0.01 if is_adaptive else np.ones_like(kernel)
    norm = np.sqrt(np.sum((scale * g_kernel) ** 2) + np.sum(g_bias**2))
    away = RHO * scale**2 * g_kernel / norm, RHO * g_bias / norm
    there = _gradients(x, y, kernel + away[0], bias + away[1])
    for found, weight, gradient in zip(net.get_weights(), (kernel, bias), there, strict=True):
        np.testing.assert_allclose(found, weight - RATE * gradient, rtol=1e-5, atol=1e-6)


def test_a_vanishing_gradient_moves_nothing(sharpness_aware):
    zeros = np.zeros((2, 2), "float32")
    (away,) = sharpness_aware.ascent([zeros], [zeros + 1], RHO, is_adaptive=False)
    np.testing.assert_array_equal(away, zeros)
