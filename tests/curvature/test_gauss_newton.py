"""Products with the exact Gauss-Newton matrix against the dense one in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import Objective, gauss_newton_form
from tf_kfacprune.curvature.hessian import CurvatureOperator

LOSSES = {
    "softmax": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "sigmoid": keras.losses.BinaryCrossentropy(from_logits=True),
    "squared": keras.losses.MeanSquaredError(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_products_equal_those_of_the_dense_matrix(name):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, activation="tanh")(inputs)
    network = keras.Model(inputs, keras.layers.Dense(2)(x))
    rng = np.random.default_rng(0)
    data = rng.normal(size=(7, 4)).astype("float32")
    labels = np.arange(7) % 2 if name == "softmax" else (rng.random((7, 2)) > 0.5).astype("float32")
    variables = network.trainable_variables
    directions = [[tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables]] * 1
    directions.append([tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables])
    got = gauss_newton_form(
        network, data, labels, Objective(LOSSES[name]), variables, directions, training=False
    )
    operator = CurvatureOperator(network, (data, labels), LOSSES[name], curvature="ggn")
    flat = [np.concatenate([np.array(t, "float64").ravel() for t in d]) for d in directions]
    expected = [[p @ operator.matvec(q) for q in flat] for p in flat]
    np.testing.assert_allclose(np.array(got), expected, rtol=2e-5)


def test_examples_count_by_their_weights():
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    rng = np.random.default_rng(0)
    data, labels = rng.normal(size=(5, 4)).astype("float32"), np.arange(5) % 3
    variables = network.trainable_variables
    direction = [tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables]
    objective = Objective(LOSSES["softmax"])

    def form(rows, weights=None):
        return gauss_newton_form(
            network, data[rows], labels[rows], objective, variables, [direction],
            training=False, weights=weights,
        ).numpy()  # fmt: skip

    weights = np.array([2.0, 0.0, 1.0, 0.5, 3.0], "float32")
    expected = np.mean([w * form([k]) for k, w in enumerate(weights)], axis=0)
    np.testing.assert_allclose(form(np.arange(5), weights), expected, rtol=1e-5)


def test_saturated_probabilities_have_finite_logits_in_half_precision():
    objective = Objective("binary_crossentropy")
    natural = objective.natural_parameters(tf.constant([[1.0, 0.0, 0.5]], tf.bfloat16))
    assert natural.dtype == tf.float32
    assert np.all(np.isfinite(natural.numpy()))
