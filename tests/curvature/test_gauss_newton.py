"""The quadratic model of a batch: dense Gauss-Newton matrix and Hessian of what layers add."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.keras_features import IS_OLD
from tf_kfacprune.curvature import Batch, CompiledObjective, CurvatureEstimator
from tf_kfacprune.errors import InvalidArgumentError

B = 6
WEIGHTS = np.array([2.0, 0.0, 1.0, 0.5, 3.0, 1.5], "float32")
losses = keras.losses


def softmax_hessian(f):
    e = np.exp(f - f.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    return np.einsum("nd,de->nde", p, np.eye(f.shape[1])) - np.einsum("nd,ne->nde", p, p)


def directions_for(size, seed=0):
    return np.random.default_rng(seed).normal(size=(2, size))


def in_parts(directions, variables):
    """Flat directions as tensors; parameters come in the order kernel, bias, layer by layer."""
    ends = np.cumsum([int(np.prod(v.shape)) for v in variables])[:-1]
    return [
        [
            tf.constant(part.reshape(v.shape), tf.float32)
            for part, v in zip(np.split(d, ends), variables, strict=True)
        ]
        for d in directions
    ]


def form_of(model, batch, directions, is_whole=True):
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    variables = model.trainable_variables
    return np.array(
        estimator.quadratic_form(
            batch, variables, in_parts(directions, variables), is_whole=is_whole
        )
    )


def check(got, dense, directions):
    expected = directions @ dense @ directions.T
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# name -> (losses, factors of the losses, Hessian of each by its predictions)
def _cubed(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred) ** 3, axis=-1)


def _diagonal(values):
    return np.einsum("nd,de->nde", values, np.eye(values.shape[1])) / values.shape[1]


CASES = {
    "softmax": losses.SparseCategoricalCrossentropy(from_logits=True),
    "squares": "mse",
    "custom": _cubed,
    "absolute": "mae",
}


def _hessian(name, f, y):
    if name == "softmax":
        return softmax_hessian(f)
    errors = {"squares": np.full_like(f, 2.0), "custom": 6 * abs(y - f), "absolute": 0 * f}
    return _diagonal(errors[name])


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_matrix_with_weights_of_examples(two_layers, name):
    reference = two_layers(3)
    model = reference.network()
    model.compile("sgd", CASES[name], loss_weights=[2.0])
    x = reference.inputs(B)
    ((f,), (j,)) = reference.outputs(x), reference.jacobians(x)
    y = np.arange(B) % 3 if name == "softmax" else np.ones((B, 3), "float32")
    h = _hessian(name, f, y)
    dense = np.einsum("n,nda,nde,neb->ab", 2 * WEIGHTS / B, j, h, j)
    directions = directions_for(reference.size)
    check(form_of(model, Batch(x, y, WEIGHTS), directions), dense, directions)


PER_BATCH = pytest.mark.skipif(IS_OLD, reason="activities are no means over the batch yet")


@pytest.mark.parametrize(
    "regularizer", ["l2", "l1", pytest.param("activity", marks=PER_BATCH), "add_loss"]
)
def test_what_layers_add_counts_with_its_own_hessian(two_layers, regularizer):
    """Two outputs with different losses; regularizers of the hidden kernel or of the outputs."""
    reference = two_layers(3, 2)
    plain = reference.network()
    inputs = x = keras.Input((4,))
    kernel_regularizer = {"l2": keras.regularizers.L2(0.3), "l1": keras.regularizers.L1(0.3)}
    x = keras.layers.Dense(
        5, "tanh", kernel_regularizer=kernel_regularizer.get(regularizer), name="hidden"
    )(x)
    activity = keras.regularizers.L2(0.1) if regularizer == "activity" else None
    first = keras.layers.Dense(3, activity_regularizer=activity, name="output0")(x)
    second = keras.layers.Dense(2, name="output1")(x)
    if regularizer == "add_loss":

        class Added(keras.layers.Layer):
            def call(self, inputs):
                self.add_loss(0.2 * tf.reduce_mean(tf.square(inputs)))
                return inputs

        # Of one depth, so that the model lists their weights in the order of the reference.
        first, second = keras.layers.Identity()(first), Added()(second)
    model = keras.Model(inputs, [first, second])
    for name in ("hidden", "output0", "output1"):
        model.get_layer(name).set_weights(plain.get_layer(name).get_weights())
    softmax = CASES["softmax"]
    model.compile("sgd", [softmax, "mse"], loss_weights=[1.0, 0.5])
    x = reference.inputs(B)
    f, j = reference.outputs(x), reference.jacobians(x)
    squares = _diagonal(np.full_like(f[1], 2.0))
    dense = np.einsum("nda,nde,neb->ab", j[0], softmax_hessian(f[0]), j[0]) / B
    dense += 0.5 * np.einsum("nda,nde,neb->ab", j[1], squares, j[1]) / B
    if regularizer == "l2":  # 0.3 |U|^2 without the bias
        dense += np.diag(np.where(np.arange(reference.size) < 20, 0.6, 0.0))
    if regularizer in ("activity", "add_loss"):
        # Keras divides what an activity regularizer returns by the batch size.
        output, scale = (0, 0.1 / B) if regularizer == "activity" else (1, 0.2 / (B * 2))
        dense += scale * _hessian_of_squares(reference, x, output)
    y = [np.arange(B) % 3, np.zeros((B, 2), "float32")]
    directions = directions_for(reference.size)
    check(form_of(model, Batch(x, y), directions), dense, directions)
    part = Batch(x, y).head(0.5)
    if regularizer in ("l1", "l2"):
        assert np.isfinite(form_of(model, part, directions, is_whole=False)).all()
        return
    with pytest.raises(InvalidArgumentError, match=r"activity_regularizer, add_loss.*\n?.*batch_"):
        form_of(model, part, directions, is_whole=False)


def _hessian_of_squares(reference, x, output):
    """Hessian of the sum of squares of one output by all parameters: differences of gradients."""

    def gradient(flat):
        moved = type(reference)(*(v.shape[1] for v in reference.v))
        moved.u = flat[: reference.u.size].reshape(reference.u.shape)
        start, moved.v = reference.u.size, []
        for v in reference.v:
            moved.v.append(flat[start : start + v.size].reshape(v.shape))
            start += v.size
        f, j = moved.outputs(x)[output], moved.jacobians(x)[output]
        return 2 * np.einsum("nd,nda->a", f, j)

    flat = np.concatenate([reference.u.ravel(), *(v.ravel() for v in reference.v)])
    flat, step = flat.astype("float64"), 1e-5
    unit = step * np.eye(flat.size)
    rows = [(gradient(flat + u) - gradient(flat - u)) / (2 * step) for u in unit]
    return np.array(rows)


def test_directions_of_some_parameters_will_do(two_layers):
    reference = two_layers(3)
    model = reference.network()
    model.compile("sgd", "mse")
    x = reference.inputs(B)
    variables = model.get_layer("output0").trainable_variables
    directions = directions_for(reference.size)
    directions[:, : reference.u.size] = 0
    (j,) = reference.jacobians(x)
    dense = np.einsum("nda,ndb->ab", j, j) * 2 / (3 * B)
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    parts = in_parts(directions[:, reference.u.size :], variables)
    batch = Batch(x, np.zeros((B, 3), "float32"))
    got = estimator.quadratic_form(batch, variables, parts, is_whole=True)
    check(np.array(got), dense, directions)
