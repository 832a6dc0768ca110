"""The deny list: what it names is wrong or missing, what it lets pass is right."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_kfacprune.curvature.diagnostics import CurvatureOperator
from tf_kfacprune.curvature.second_derivatives import (
    check_second_derivatives,
    second_derivative_faults,
)
from tf_kfacprune.errors import UnsupportedModelError

IMAGE = (4, 4, 2)


def model_with(*parts, shape=IMAGE) -> keras.Model:
    x = inputs = keras.Input(shape, dtype="float64")
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


FAULTY = {
    "layer normalization": lambda: layers.LayerNormalization(dtype="float64"),
    "group normalization": lambda: layers.GroupNormalization(1, dtype="float64"),
    "bilinear": lambda: layers.UpSampling2D(interpolation="bilinear", dtype="float64"),
    "bicubic": lambda: layers.UpSampling2D(interpolation="bicubic", dtype="float64"),
    "resizing": lambda: layers.Resizing(3, 3, dtype="float64"),
    "softsign": lambda: layers.Dense(2, activation="softsign", dtype="float64"),
    "softsign activation": lambda: layers.Activation("softsign", dtype="float64"),
    "softsign operation": lambda: keras.ops.softsign,
    "moments": lambda: lambda x: keras.ops.moments(x, [-1], keepdims=True)[1],
    "layer normalization operation": lambda: keras.ops.layer_normalization,
}


def second_derivative_error(model: keras.Model) -> float:
    """Relative error of a Hessian-vector product in x against differences of the gradient."""
    x = np.random.default_rng(0).normal(size=(2, *IMAGE))
    v = np.random.default_rng(1).normal(size=x.shape)

    def gradient(point):
        with tf.GradientTape() as tape:
            tape.watch(point)
            y = tf.cast(model(point, training=False), tf.float64)
            value = tf.reduce_sum(tf.sin(y) + y**3)
        return tape.gradient(value, point)

    point = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(point)
        along = tf.reduce_sum(gradient(point) * v)
    product = tape.gradient(along, point, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    differences = (gradient(tf.constant(x + 1e-5 * v)) - gradient(tf.constant(x - 1e-5 * v))) / 2e-5
    return float(tf.norm(product - differences) / tf.norm(differences))


@pytest.mark.parametrize("build", FAULTY.values(), ids=FAULTY.keys())
def test_what_is_denied_is_wrong_or_missing(build):
    model = model_with(build())
    assert len(second_derivative_faults(model)) == 1
    try:
        error = second_derivative_error(model)
    except LookupError:
        error = np.inf
    assert error > 1e-3  # once TensorFlow mends it, the entry can go


SOUND = {
    "batch normalization": lambda: layers.BatchNormalization(dtype="float64"),
    "rms normalization": lambda: layers.RMSNormalization(dtype="float64"),
    "unit normalization": lambda: layers.UnitNormalization(dtype="float64"),
    "nearest": lambda: layers.UpSampling2D(dtype="float64"),
    "max pooling": lambda: layers.MaxPooling2D(dtype="float64"),
    "transposed convolution": lambda: layers.Conv2DTranspose(2, 2, dtype="float64"),
    "separable convolution": lambda: layers.SeparableConv2D(2, 2, dtype="float64"),
    "gelu": lambda: layers.Dense(2, activation="gelu", dtype="float64"),
}


@pytest.mark.parametrize("build", SOUND.values(), ids=SOUND.keys())
def test_what_is_let_pass_is_right(build):
    model = model_with(build())
    assert not second_derivative_faults(model)
    assert second_derivative_error(model) < 1e-7


def test_faults_are_found_in_nested_models_and_wrappers():
    inner = keras.Sequential([keras.Input(IMAGE), layers.Resizing(3, 3, name="deep")])
    wrapped = layers.TimeDistributed(layers.LayerNormalization(name="wrapped"), name="each")
    faults = second_derivative_faults(model_with(inner, wrapped))
    assert {fault.name for fault in faults} == {"deep", "wrapped"}


def test_refusal_names_the_layer_and_the_way_out():
    model = model_with(layers.LayerNormalization(name="norm"), layers.Flatten(), layers.Dense(1))
    with pytest.raises(UnsupportedModelError, match=r"'norm' \(LayerNormalization\).*'ggn'"):
        check_second_derivatives(model)
    check_second_derivatives(model, jacobian_only=True)


IN_FLOAT32 = ("bilinear", "bicubic", "resizing")  # TensorFlow resizes in float32 only


@pytest.mark.parametrize("name", FAULTY)
def test_products_with_the_hessian_are_exact_nevertheless(name):
    """Against differences of the gradient along one direction, all parameters taking part."""
    first, last = layers.Dense(3, dtype="float64"), layers.Dense(1, dtype="float64")
    model = model_with(first, FAULTY[name](), layers.Flatten(dtype="float64"), last)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, *IMAGE)), rng.normal(size=(3, 1))
    operator = CurvatureOperator(model, (x, y), "mse")
    values = [0.7 * rng.normal(size=v.shape) for v in model.trainable_variables]
    direction = rng.normal(size=operator.dimension)

    def gradient_at(step):
        ends = np.cumsum([v.size for v in values])[:-1]
        parts = np.split(direction, ends)
        for variable, value, part in zip(model.trainable_variables, values, parts, strict=True):
            variable.assign(value + step * part.reshape(value.shape))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.cast(model(x, training=False), tf.float64) - y) ** 2)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        return np.concatenate([g.numpy().ravel() for g in gradients])

    step, tolerance = (1e-2, 1e-3) if name in IN_FLOAT32 else (1e-5, 1e-7)
    differences = (gradient_at(step) - gradient_at(-step)) / (2 * step)
    gradient_at(0.0)
    error = np.linalg.norm(operator.matvec(direction) - differences)
    assert error < tolerance * np.linalg.norm(differences)


def test_ggn_of_a_layer_normalized_model_is_exact():
    inputs = keras.Input((3,), dtype="float64")
    hidden = layers.LayerNormalization(dtype="float64")(layers.Dense(4, dtype="float64")(inputs))
    model = keras.Model(inputs, layers.Dense(2, dtype="float64")(hidden))
    x = np.random.default_rng(0).normal(size=(3, 3))
    operator = CurvatureOperator(model, (x, np.zeros((3, 2))), "mse", curvature="ggn")
    with tf.GradientTape() as tape:
        z = model(x)
    parts = tape.jacobian(z, [v.value for v in model.trainable_variables])
    j = np.concatenate([part.numpy().reshape(6, -1) for part in parts], axis=-1)
    matrix = np.array([operator.matvec(unit) for unit in np.eye(operator.dimension)])
    np.testing.assert_allclose(matrix, j.T @ j / 3, rtol=0, atol=1e-13)


def test_a_missing_second_derivative_that_is_not_listed_is_an_error_too():
    class Unlisted(keras.Layer):
        def call(self, x):
            return tf.nn.local_response_normalization(x)

    inputs = keras.Input(IMAGE)
    hidden = Unlisted()(layers.Conv2D(2, 1)(inputs))
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(hidden)))
    operator = CurvatureOperator(model, (np.ones((2, *IMAGE)), np.ones((2, 1))), "mse")
    with pytest.raises(UnsupportedModelError, match="LRNGrad"):
        operator.matvec(np.ones(operator.dimension))
