"""Derivatives of linear maps, image resizing above all, are those of the matrices that they are.

TensorFlow resizes in float32 only, where finite differences say little.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_kfacprune.curvature.linear_map import linear_map
from tf_kfacprune.curvature.twice_differentiable import twice_differentiable

RESIZING = {
    "bilinear": lambda: layers.UpSampling2D(interpolation="bilinear"),
    "unequal": lambda: layers.UpSampling2D((3, 1), interpolation="bilinear"),
    "bicubic": lambda: layers.UpSampling2D(interpolation="bicubic"),
    "lanczos": lambda: layers.UpSampling2D(interpolation="lanczos3"),
    "channels first": lambda: layers.UpSampling2D(
        interpolation="bilinear", data_format="channels_first"
    ),
    "resizing": lambda: layers.Resizing(3, 7),
    "antialiased": lambda: layers.Resizing(3, 4, antialias=True),
    "cropped": lambda: layers.Resizing(4, 8, crop_to_aspect_ratio=True),
    "padded": lambda: layers.Resizing(4, 8, pad_to_aspect_ratio=True, fill_value=2.0),
    "operation": lambda: lambda x: keras.ops.image.resize(x, (7, 3)),
    "each step": lambda: layers.TimeDistributed(layers.UpSampling2D(interpolation="bilinear")),
}


@pytest.mark.parametrize("build", RESIZING.values(), ids=RESIZING.keys())
def test_resizing_has_the_second_derivative_of_the_matrix_that_it_is(build, request):
    shape = (2, 4, 4, 2) if "each step" in request.node.name else (4, 4, 2)
    inputs = keras.Input(shape)
    model = keras.Model(inputs, build()(inputs))
    size = int(np.prod(shape))
    # A x + b, from unit vectors.
    b = model(np.zeros((1, *shape), "float32")).numpy()
    a = (model(np.eye(size, dtype="float32").reshape(size, *shape)).numpy() - b).reshape(size, -1)
    b = b.ravel()
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 3, *shape)).astype("float32")
    plain = model(x)

    point = tf.constant(x)
    with twice_differentiable(model), tf.GradientTape() as outer:
        outer.watch(point)
        with tf.GradientTape() as inner:
            inner.watch(point)
            y = model(point)
            value = tf.reduce_sum(tf.sin(y))
        first = inner.gradient(value, point)
        along = tf.reduce_sum(first * v)
    second = outer.gradient(along, point)
    np.testing.assert_array_equal(y, plain)
    z = x.reshape(3, -1).astype("float64") @ a + b
    np.testing.assert_allclose(first.numpy().reshape(3, -1), np.cos(z) @ a.T, rtol=0, atol=1e-5)
    expected = (-np.sin(z) * (v.reshape(3, -1) @ a)) @ a.T
    np.testing.assert_allclose(second.numpy().reshape(3, -1), expected, rtol=0, atol=1e-5)


def test_a_linear_map_has_derivatives_of_every_order():
    matrix = tf.constant([[1.0, 2.0], [0.0, -1.0]], tf.float64)
    x = tf.Variable([[0.3, -0.2]], dtype=tf.float64)

    def third(function):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as middle:
                with tf.GradientTape() as inner:
                    value = tf.reduce_sum(tf.sin(function(x)) ** 2)
                along = tf.reduce_sum(inner.gradient(value, x) * [[1.0, 3.0]])
            twice_along = tf.reduce_sum(middle.gradient(along, x) * [[-2.0, 1.0]])
        return outer.gradient(twice_along, x)

    expected = third(lambda v: v @ matrix + 1.0)
    found = third(lambda v: linear_map(lambda u: u @ matrix + 1.0, v, affine=True))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
