"""The K-FAC spectral radius of a data set against dense matrices in float64."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.errors import DataError, InvalidArgumentError, UnsupportedModelError

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
spectral_radius = kp.diagnostics.spectral_radius


def network(width=6):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = layers.Dense(width, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(hidden))
    model.layers[1].bias.assign(np.linspace(-1, 1, width))
    return model


def examples(count=20):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 4)).astype("float32"), rng.integers(0, 3, count)


def dense_radii(model, x):
    """From the definition: A and G by NumPy, G by the Jacobians of the logits."""
    weights = [np.array(w, np.float64) for w in model.weights]
    s = x @ weights[0] + weights[1]
    h = np.tanh(s)
    logits = h @ weights[2] + weights[3]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    fisher = np.einsum("bi,ij->bij", p, np.eye(3)) - np.einsum("bi,bj->bij", p, p)
    jacobian = (1 - h**2)[:, :, None] * weights[2]  # d logits / d s
    g_hidden = np.einsum("bhi,bij,bkj->hk", jacobian, fisher, jacobian) / len(x)
    radii = {}
    for name, a, g in (("hidden", x, g_hidden), ("logits", h, fisher.mean(axis=0))):
        rows = np.hstack([a, np.ones((len(a), 1))])
        radii[name] = np.linalg.eigvalsh(rows.T @ rows / len(a))[-1] * np.linalg.eigvalsh(g)[-1]
    return radii


@pytest.mark.parametrize("batch_size", [7, 500])
def test_radii_are_those_of_the_dense_factors_for_any_batch_size(batch_size):
    model, (x, y) = network(), examples()
    found = spectral_radius(model, (x, y), LOSS, batch_size=batch_size)
    expected = dense_radii(model, x)
    assert found.radii == pytest.approx(expected, rel=1e-5)
    assert found.radius == max(found.radii.values())
    assert (found.labels, found.num_examples) == ("exact", 20)


def test_sampled_labels_approach_the_exact_ones():
    model, (x, y) = network(), examples()
    many = np.tile(x, (400, 1)), np.tile(y, 400)
    found = spectral_radius(model, many, LOSS, labels="sampled", batch_size=8000)
    assert found.radii == pytest.approx(dense_radii(model, x), rel=0.1)


def test_labels_of_the_data_give_another_matrix():
    model, data = network(), examples()
    empirical = spectral_radius(model, data, LOSS, labels="data").radius
    assert empirical != pytest.approx(spectral_radius(model, data, LOSS).radius, rel=1e-2)


def test_it_is_the_exact_eigenvalue_for_one_layer_and_one_output():
    """Then the curvature of the loss does not depend on the example, and A (x) G is exact."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    x, _ = examples()
    data = (x, np.zeros((20, 1), "float32"))
    exact = kp.diagnostics.hessian_spectrum(model, data, "mse", tolerance=1e-7).top
    assert spectral_radius(model, data, "mse").radius == pytest.approx(exact, rel=1e-5)


def test_normalization_statistics_and_weights_stay_as_they_were():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(), layers.Dense(3)]
    )
    before = [np.array(w) for w in model.weights]
    spectral_radius(model, examples(), LOSS)
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.array(weight))


def test_a_prunable_model_is_measured_with_its_gates():
    model, data = network(), examples()
    plain = spectral_radius(model, data, LOSS).radii
    gated = kp.PrunableModel(model, budget=kp.Budget(macs=0.5))
    assert spectral_radius(gated, data, LOSS).radii == pytest.approx(plain, rel=1e-5)


def test_a_dataset_of_batches_will_do():
    model, data = network(), examples()
    batches = tf.data.Dataset.from_tensor_slices(data).batch(6)
    expected = spectral_radius(model, data, LOSS).radii
    assert spectral_radius(model, batches, LOSS).radii == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_measured_is_refused():
    model, data = network(), examples()
    with pytest.raises(InvalidArgumentError, match="labels"):
        spectral_radius(model, data, LOSS, labels="none")
    with pytest.raises(InvalidArgumentError, match="no known likelihood"):
        spectral_radius(model, data, "hinge", labels="sampled")
    with pytest.raises(DataError, match="no example"):
        spectral_radius(model, tf.data.Dataset.from_tensor_slices(data).batch(4).take(0), LOSS)
    only_scale = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(UnsupportedModelError, match="no Dense"):
        spectral_radius(only_scale, data, LOSS)
