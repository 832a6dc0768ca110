"""Gradients of probes make up the dense Fisher of any loss, whatever each entry counts."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import Batch, CompiledObjective, CurvatureEstimator, find_blocks
from tf_kfacprune.errors import InvalidArgumentError

B, T, D = 6, 3, 3
losses = keras.losses
WEIGHTS = np.array([2.0, 0.0, 1.0, 0.5, 3.0, 1.5], "float32")
OF_TOKENS = np.random.default_rng(1).uniform(0.0, 2.0, (B, T)).astype("float32")


def softmax(f):
    e = np.exp(f - f.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def of_softmax(f):
    p = softmax(f)
    return np.einsum("nd,de->nde", p, np.eye(f.shape[1])) - np.einsum("nd,ne->nde", p, p)


def diagonal(values):
    return np.einsum("nd,de->nde", values, np.eye(values.shape[1])) / values.shape[1]


def of_squares(f):
    return diagonal(np.full_like(f, 2.0))


def of_sigmoid(f):
    p = 1 / (1 + np.exp(-f))
    return diagonal(p * (1 - p))


# name -> (loss, activation of the head, whether labels are classes, Hessian of the loss by f)
LOSSES = {
    "softmax": (losses.SparseCategoricalCrossentropy(from_logits=True), None, True, of_softmax),
    "probabilities": (losses.SparseCategoricalCrossentropy(), "softmax", True, of_softmax),
    "one-hot": (losses.CategoricalCrossentropy(), "softmax", False, of_softmax),
    "squares": ("mse", None, False, of_squares),
    "log odds": (losses.BinaryCrossentropy(from_logits=True), None, False, of_sigmoid),
    "sigmoid": ("binary_crossentropy", "sigmoid", False, of_sigmoid),
    "poisson": ("poisson", "exponential", False, lambda f: diagonal(np.exp(f))),
}


def labels_of(is_class, *leading):
    classes = np.random.default_rng(2).integers(0, D, leading)
    return classes if is_class else np.eye(D, dtype="float32")[classes]


def dense(reference, x, coefficients, hessians):
    """`sum_i c_i J_i^T H_i J_i` over outputs and entries."""
    return sum(
        np.einsum("n,nda,nde,neb->ab", np.ravel(c), j, h, j, optimize=True)
        for c, h, j in zip(coefficients, hessians, reference.jacobians(x), strict=True)
    )


def close(got, expected, rtol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("labels", ["sampled", "exact"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_fisher_is_the_gauss_newton_matrix_with_weights_of_examples(
    two_layers, fisher_of, name, labels
):
    loss, activation, is_class, hessian = LOSSES[name]
    reference = two_layers(D)
    model = reference.network(activations=[activation])
    model.compile("sgd", loss, loss_weights=[2.5])
    x = reference.inputs(B)
    batch = Batch(x, labels_of(is_class, B), WEIGHTS)
    (f,) = reference.outputs(x)
    expected = dense(reference, x, [2.5 * WEIGHTS / B], [hessian(f)])
    close(fisher_of(model, batch, labels), expected)


MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
IGNORED = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
# name -> (arguments of the loss, weights, whether MASK masks, what each token counts)
TOKENS = {
    "plain": ({}, None, False, np.full((B, T), 1 / (B * T))),
    "weights of examples": (
        {},
        WEIGHTS[:, None],
        False,
        np.repeat(WEIGHTS[:, None], T, 1) / (B * T),
    ),
    "weights of tokens": ({}, OF_TOKENS, False, OF_TOKENS / (B * T)),
    "mask": ({}, None, True, MASK / MASK.sum()),
    "mask and weights": ({}, OF_TOKENS, True, MASK * OF_TOKENS / MASK.sum()),
    "ignored class": ({"ignore_class": 7}, None, False, ~IGNORED / (~IGNORED).sum()),
    "mean of weights": (
        {"reduction": "mean_with_sample_weight"},
        OF_TOKENS,
        False,
        OF_TOKENS / OF_TOKENS.sum(),
    ),
    "sum": ({"reduction": "sum"}, OF_TOKENS, False, OF_TOKENS),
}


@pytest.mark.parametrize("name", TOKENS)
def test_the_fisher_of_tokens_is_what_each_of_them_counts(two_layers, fisher_of, name):
    arguments, weights, is_masked, coefficients = TOKENS[name]
    reference = two_layers(D)
    model = reference.network(T, masked=is_masked)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True, **arguments))
    x = reference.inputs(B, T) * (MASK[..., None] if is_masked else 1)
    y = labels_of(True, B, T)
    y = np.where(IGNORED, 7, y) if "ignore_class" in arguments else y
    (f,) = reference.outputs(x)
    expected = dense(reference, x, [coefficients], [of_softmax(f)])
    close(fisher_of(model, Batch(x, y, weights), "sampled"), expected)


@pytest.mark.parametrize("labels", ["sampled", "exact"])
@pytest.mark.parametrize("structure", ["list", "dict"])
def test_outputs_add_up_by_their_losses_and_weights(two_layers, fisher_of, structure, labels):
    reference = two_layers(3, 4, 2)
    names = ["classes", "flags", "values"]
    model = reference.network(names=names)
    of = [
        losses.SparseCategoricalCrossentropy(from_logits=True),
        losses.BinaryCrossentropy(from_logits=True),
        "mse",
    ]
    y = [labels_of(True, B), np.ones((B, 4), "float32"), np.ones((B, 2), "float32")]
    weights = [WEIGHTS, WEIGHTS[::-1].copy(), np.ones(B, "float32")]
    factors = [0.5, 2.0, 3.0]
    if structure == "dict":
        model = keras.Model(model.input, dict(zip(names, model.outputs, strict=True)))
        of, y, weights, given = (
            dict(zip(names, parts, strict=True)) for parts in (of, y, weights, factors)
        )
        model.compile("sgd", of, loss_weights=given)
    else:
        model.compile("sgd", of, loss_weights=factors)
    x = reference.inputs(B)
    f = reference.outputs(x)
    each = [WEIGHTS, WEIGHTS[::-1], np.ones(B)]
    coefficients = [a * w / B for a, w in zip(factors, each, strict=True)]
    hessians = [of_softmax(f[0]), of_sigmoid(f[1]), of_squares(f[2])]
    expected = dense(reference, x, coefficients, hessians)
    close(fisher_of(model, Batch(x, y, weights), labels), expected)


def squared(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred), axis=-1)


def summed(y_true, y_pred):
    return tf.reduce_sum(tf.square(y_true - y_pred), axis=-1)


def scalar(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred))


class Fourth(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return tf.reduce_mean((y_true - y_pred) ** 4, axis=-1)


class Tripled(keras.losses.MeanSquaredError):
    def call(self, y_true, y_pred):
        return 3.0 * super().call(y_true, y_pred)


def huber_slope(e):
    return np.clip(e, -1, 1)


# name -> (loss, its slope by one output's error without the mean, whether it is one)
UNKNOWN = {
    "huber": ("huber", huber_slope, True),
    "mae": ("mae", np.sign, True),
    "function": (squared, lambda e: 2 * e, True),
    "sum": (summed, lambda e: 2 * e, False),
    "subclass": (Fourth(), lambda e: 4 * e**3, True),
    "subclass of a known one": (Tripled(), lambda e: 6 * e, True),
    "scalar": (scalar, lambda e: 2 * e, True),
}


@pytest.mark.parametrize("labels", ["sampled", "exact", "data"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_losses_without_a_likelihood_count_by_the_labels_of_the_data(
    two_layers, fisher_of, name, labels
):
    """A mean over D outputs has a D-th of the Fisher of one, a D^2-th of its squared gradient."""
    loss, slope, is_mean = UNKNOWN[name]
    reference = two_layers(D)
    model = reference.network()
    model.compile("sgd", loss, loss_weights=[2.0])
    x = reference.inputs(B)
    y = np.random.default_rng(3).normal(size=(B, D)).astype("float32")
    weights = None if name == "scalar" else WEIGHTS
    (f,) = reference.outputs(x)
    gradients = slope(f - y) / (D if is_mean else 1)
    squares = np.einsum("nd,ne->nde", gradients, gradients) * (D if is_mean else 1)
    each = np.ones(B) if weights is None else weights
    expected = dense(reference, x, [2.0 * each / B], [squares])
    close(fisher_of(model, Batch(x, y, weights), labels, sizes=[1]), expected)


def test_predictions_without_an_axis_of_outputs_have_one(two_layers, fisher_of):
    """Keras averages such losses over the batch first, then weighs that with the mean weight."""
    reference = two_layers(1)
    model = reference.network()
    model = keras.Model(model.input, model.output[:, 0])
    model.compile("sgd", "mse")
    x, (f,) = reference.inputs(B), reference.outputs(reference.inputs(B))
    coefficients = [np.full(B, WEIGHTS.mean() / B)]
    batch = Batch(x, f[:, 0] - 1, WEIGHTS)
    expected = dense(reference, x, coefficients, [np.full((B, 1, 1), 2.0)])
    close(fisher_of(model, batch, "sampled"), expected)
    close(fisher_of(model, batch, "data"), 2 * expected)  # errors of 1, a variance of 1/2
    with pytest.raises(InvalidArgumentError, match=r"predictions of shape \(6,\)"):
        fisher_of(model, batch, "exact")


@pytest.mark.parametrize("outputs", [1, 4])
def test_labels_drawn_from_the_model_give_the_data_the_scale_of_the_fisher(
    two_layers, fisher_of, outputs
):
    """Over a set of labels with the model's second moments the empirical Fisher is the true one."""
    reference = two_layers(outputs)
    model = reference.network()
    model.compile("sgd", "mse")
    x = reference.inputs(B)
    (f,) = reference.outputs(x)
    two = np.array([[1, 1], [1, -1]])
    signs = np.kron(two, two) if outputs == 4 else np.array([[1], [-1]])
    found = [
        fisher_of(model, Batch(x, (f + s / np.sqrt(2)).astype("float32")), "data") for s in signs
    ]
    close(np.mean(found, axis=0), dense(reference, x, [np.full(B, 1 / B)], [of_squares(f)]))
    close(np.mean(found, axis=0), fisher_of(model, Batch(x, f), "exact"))


def test_probes_have_the_fisher_as_their_expectation(two_layers):
    """With the noise that training draws; the standard error of a second moment is known."""
    reference, draws = two_layers(D), 4000
    model = reference.network()
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.repeat(reference.inputs(1), draws, axis=0)
    estimator = CurvatureEstimator(model, CompiledObjective(model), keras.random.SeedGenerator(0))
    blocks = find_blocks(model).blocks
    look = estimator.look(Batch(x, np.zeros(draws)), blocks, "sampled", training=True)
    g = np.asarray(look.of(blocks[-1].layer).probes[0][0], "float64")
    products = np.einsum("ni,nj->nij", g, g)
    error = (products.mean(0) - of_softmax(reference.outputs(x[:1])[0])[0]) / products.std(0)
    assert np.abs(error).max() * np.sqrt(draws) < 5


def test_a_loss_that_counts_on_its_batch_size_is_told_about_the_fraction(two_layers):
    def fixed(y_true, y_pred):
        return tf.reduce_mean(tf.square(y_pred - y_true) * tf.ones((B, 1)), axis=-1)

    reference = two_layers(2)
    model = reference.network()
    model.compile("sgd", fixed)
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    batch = Batch(reference.inputs(B), np.zeros((B, 2), "float32"))
    blocks = find_blocks(model).blocks
    assert estimator.look(batch, blocks, "sampled", training=True).probes
    with pytest.raises(InvalidArgumentError, match=r"Loss 'fixed' .*batch_fraction=1 "):
        estimator.look(batch.head(0.5), blocks, "sampled", training=True)


@pytest.mark.parametrize("shape", [(300,), (3, 4)])
def test_exact_labels_refuse_outputs_that_would_take_too_many_passes(shape):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, keras.layers.Dense(shape[-1])(inputs))
    model.compile("sgd", "mse")
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    x = np.zeros((2, *shape), "float32")
    with pytest.raises(InvalidArgumentError, match="labels='sampled'"):
        estimator.look(Batch(x, x), find_blocks(model).blocks, "exact", training=True)


def test_a_part_of_a_batch_is_the_same_part_of_inputs_labels_and_weights():
    x = {"a": np.arange(10), "b": np.zeros((10, 2))}
    part = Batch(x, [np.arange(10), None], (np.arange(10.0),)).head(0.25)
    for tensor in (part.x["a"], part.y[0], part.weights[0]):
        np.testing.assert_array_equal(tensor, [0, 1, 2])
    assert part.x["b"].shape == (3, 2)
    assert part.y[1] is None
    assert int(part.size) == 3
    assert Batch(x).head(0.01).x["a"].shape == (1,)
    whole = Batch(x)
    assert whole.head(1.0) is whole


def test_a_look_leaves_the_states_of_recurrent_layers_as_they_were():
    inputs = keras.Input(batch_shape=(5, 3, 4))
    lstm = keras.layers.LSTM(3, stateful=True)
    model = keras.Model(inputs, keras.layers.Dense(2)(lstm(inputs)))
    model.compile("sgd", "mse")
    x = np.ones((5, 3, 4), "float32")
    model(x)
    before = [np.array(state) for state in lstm.states]
    assert all(state.any() for state in before)
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    batch = Batch(x, np.zeros((5, 2), "float32"))
    estimator.look(batch, find_blocks(model).blocks, "sampled", training=True)
    for old, state in zip(before, lstm.states, strict=True):
        np.testing.assert_array_equal(state, old)


def test_a_look_leaves_statistics_and_seeds_as_they_were():
    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dropout(0.5)(x)))
    model.compile("sgd", "mse")
    before = [np.array(v) for v in model.variables]
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    batch = Batch(np.ones((5, 4), "float32"), np.zeros((5, 2), "float32"))
    estimator.look(batch, find_blocks(model).blocks, "sampled", training=True)
    directions = [[tf.ones(v.shape) for v in model.trainable_variables]]
    estimator.quadratic_form(batch, model.trainable_variables, directions, is_whole=True)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(np.array(variable), old)
