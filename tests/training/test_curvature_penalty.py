"""Spectral radius and its gradient against dense factors in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import (
    SpectralRadius,
    block_for,
    capture,
    per_example_gradients,
)
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.training.batches import head_of_batch
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty

to_numpy = keras.ops.convert_to_numpy
BATCH = 12


def _network():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(3, 3, activation="tanh", bias_initializer="random_normal")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    model.layers[2].moving_mean.assign([0.1, -0.1, 0.2])
    return model


def _data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(BATCH, 6, 6, 1)).astype("float32"), np.arange(BATCH) % 4


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _mean_loss(outputs, y):
    return LOSS(y, outputs)


def _converged_gradients(penalty, model, x, y):
    """Gradients after enough steps for the eigenvectors to converge."""
    step = tf.function(
        lambda: penalty.gradients(tf.constant(0), x, y, _mean_loss, model.trainable_variables)
    )
    for _ in range(250):
        gradients = step()
    return gradients


def _penalty(model, **settings):
    blocks = [block_for(layer) for layer in model.layers if hasattr(layer, "kernel")]
    return CurvaturePenalty(SpectralRadius(every=1, batch_fraction=1.0, **settings), model, blocks)


def _dense_radii(model, x, y):
    """lambda_max(A) lambda_max(G) of each block from dense factors, eigenvalues in float64."""
    blocks = [block_for(layer) for layer in model.layers if hasattr(layer, "kernel")]
    records, g = per_example_gradients(model, x, blocks, lambda o: _mean_loss(o, y), training=False)
    factors = [b.factors([r], [[d]]) for b, r, d in zip(blocks, records, g, strict=True)]
    top = [[np.linalg.eigvalsh(np.array(f, "float64"))[-1] for f in pair] for pair in factors]
    return [a * g for a, g in top]


def test_capture_is_bit_equal_to_the_model_and_leaves_the_layers_alone():
    model = _network()
    x, _ = _data()
    blocks = [block_for(layer) for layer in model.layers if hasattr(layer, "kernel")]
    activations = [block.layer.activation for block in blocks]
    outputs, records = capture(model, x, blocks, training=False)
    np.testing.assert_array_equal(np.array(outputs), np.array(model(x, training=False)))
    assert [record.layer.name for record in records] == [block.name for block in blocks]
    assert [block.layer.activation for block in blocks] == activations


@pytest.mark.parametrize("reduction", ["max", "sum", "smooth_max"])
def test_the_radius_converges_to_that_of_the_dense_factors(reduction):
    model = _network()
    x, y = _data()
    penalty = _penalty(model, reduction=reduction)
    _converged_gradients(penalty, model, x, y)
    radii = np.array(_dense_radii(model, x, y))
    expected = {"max": radii.max(), "sum": radii.sum(), "smooth_max": np.sum(radii**8) ** (1 / 8)}
    assert float(penalty.radius()) == pytest.approx(expected[reduction], rel=1e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_the_gradient_equals_finite_differences_of_the_dense_radius(relative):
    model = _network()
    x, y = _data()
    penalty = _penalty(model, strength=1.0, relative=relative, reduction="sum")
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]

    def total():
        weights = [np.sum(to_numpy(k) ** 2) if relative else 1.0 for k in kernels]
        return np.dot(weights, _dense_radii(model, x, y))

    gradients = _converged_gradients(penalty, model, x, y)
    rng = np.random.default_rng(3)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        direction = rng.normal(size=variable.shape).astype("float32")
        direction /= np.linalg.norm(direction)
        start, step = to_numpy(variable), 1e-2
        values = []
        for sign in (1, -1):
            variable.assign(start + sign * step * direction)
            values.append(total())
        variable.assign(start)
        expected = (values[0] - values[1]) / (2 * step)
        got = float(np.sum(np.array(gradient) * direction))
        assert got == pytest.approx(expected, rel=2e-2, abs=2e-3), variable.path


def test_relative_radii_are_blind_to_rescaled_inputs_and_layers_and_plain_ones_are_not():
    def scaled_penalty(relative, inputs=1.0, layers=1.0):
        keras.utils.set_random_seed(0)
        first = keras.layers.Dense(5, "relu", use_bias=False)
        second = keras.layers.Dense(3, use_bias=False)
        model = keras.Sequential([keras.Input((4,)), first, second])
        first.kernel.assign(first.kernel * layers / inputs)
        second.kernel.assign(second.kernel / layers)
        x = inputs * np.random.default_rng(0).normal(size=(BATCH, 4)).astype("float32")
        penalty = _penalty(model, strength=1.0, relative=relative)
        kernels = [first.kernel, second.kernel]
        y = np.arange(BATCH) % 3
        gradients = penalty.gradients(tf.constant(0), x, y, _mean_loss, kernels)
        # along a change of all kernels by the same percentage
        return sum(
            float(tf.reduce_sum(g * to_numpy(k))) for g, k in zip(gradients, kernels, strict=True)
        )

    for changes in ({"inputs": 5.0}, {"layers": 3.0}):
        assert scaled_penalty(True, **changes) == pytest.approx(scaled_penalty(True), rel=1e-4)
        assert scaled_penalty(False, **changes) != pytest.approx(scaled_penalty(False), rel=0.1)


def test_a_batch_that_is_not_finite_leaves_averages_and_directions_alone():
    model = _network()
    x, y = _data()
    penalty = _penalty(model)
    variables = model.trainable_variables
    penalty.gradients(tf.constant(0), x, y, _mean_loss, variables)
    before = [to_numpy(w) for w in penalty.weights]
    x[0, 0, 0] = np.inf
    penalty.gradients(tf.constant(0), x, y, _mean_loss, variables)
    for old, weight in zip(before, penalty.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(weight))


def test_below_the_threshold_there_is_no_gradient():
    model = _network()
    x, y = _data()
    penalty = _penalty(model, threshold=1e6)
    gradients = penalty.gradients(tf.constant(0), x, y, _mean_loss, model.trainable_variables)
    assert all(not np.any(np.array(g)) for g in gradients)
    assert float(penalty.radius()) > 0


def test_the_penalty_is_due_every_kth_step_with_weight_k():
    model = _network()
    x, y = _data()
    blocks = [block_for(layer) for layer in model.layers if hasattr(layer, "kernel")]
    once = CurvaturePenalty(SpectralRadius(1.0, every=1, batch_fraction=1.0), model, blocks)
    third = CurvaturePenalty(SpectralRadius(1.0, every=3, batch_fraction=1.0), model, blocks)
    variables = model.trainable_variables
    reference = once.gradients(tf.constant(0), x, y, _mean_loss, variables)
    sizes = []
    for step in range(4):
        gradients = third.gradients(tf.constant(step), x, y, _mean_loss, variables)
        sizes.append(sum(float(tf.reduce_sum(tf.abs(g))) for g in gradients))
        if step == 0:
            for g, r in zip(gradients, reference, strict=True):
                np.testing.assert_allclose(np.array(g), 3 * np.array(r), rtol=1e-5, atol=1e-6)
    assert [size > 0 for size in sizes] == [True, False, False, True]


def test_head_of_batch_takes_the_first_share_of_every_tensor():
    data = {"a": tf.range(10), "b": tf.zeros((10, 2)), "none": None}
    head = head_of_batch(data, 0.25)
    assert head["a"].shape[0] == head["b"].shape[0] == 3
    assert head["none"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": -1.0},
        {"relative": 1.0},
        {"threshold": -1.0},
        {"reduction": "mean"},
        {"every": 0},
        {"batch_fraction": 1.5},
        {"labels": "none"},
    ],
    ids=str,
)
def test_bad_settings_are_named(arguments):
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        SpectralRadius(**arguments)
