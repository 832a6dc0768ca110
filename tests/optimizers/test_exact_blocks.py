"""Averaged curvature of linear layers with squared loss: it is the exact Gauss-Newton matrix.

The outputs are the entries of what the layer makes, so that each location counts by itself and
the Hessian of the loss is the same multiple of the identity at all of them: `A (x) G` is exact.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import Batch, CompiledObjective, CurvatureEstimator, find_blocks
from tf_kfacprune.optimizers import KFAC

L = keras.layers
B = 5
WEIGHTS = np.array([2.0, 0.0, 1.0, 0.5, 3.0], "float32")
to_numpy = keras.ops.convert_to_numpy


class Rows(L.Layer):
    """`(batch, T, n)` as `(batch T, n)`: several rows of each example."""

    def call(self, x):
        return tf.reshape(x, (-1, x.shape[-1]))


class Together(L.Layer):
    """`(batch T, n)` as `(batch, T n)`."""

    def __init__(self, rows, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    def call(self, x):
        return tf.reshape(x, (-1, self.rows * x.shape[-1]))


def _of_layer(layer, *shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, L.Flatten()(layer(inputs)))


def _of_rows():
    inputs = keras.Input((4, 3))
    return keras.Model(inputs, Together(4)(L.Dense(2)(Rows()(inputs))))


def _used_twice(layer):
    """The layer is used on a sequence and on a vector."""
    sequence, vector = keras.Input((4, 3)), keras.Input((3,))
    parts = [L.Flatten()(layer(sequence)), layer(vector)]
    return keras.Model([sequence, vector], L.Concatenate()(parts))


NETWORKS = {
    "dense": lambda: _of_layer(L.Dense(2), 4, 3),
    "rows": _of_rows,
    "einsum that swaps": lambda: _of_layer(
        L.EinsumDense("abcd,de->acbe", (5, 4, 2), bias_axes="e"), 4, 5, 3
    ),
    "einsum of groups": lambda: _of_layer(
        L.EinsumDense("abc,bcd->abd", (4, 2), bias_axes="bd"), 4, 3
    ),
    "causal": lambda: _of_layer(L.Conv1D(2, 2, padding="causal", dilation_rate=2), 6, 3),
    "grouped": lambda: _of_layer(L.Conv2D(4, 3, strides=2, padding="same", groups=2), 6, 5, 2),
    "depthwise": lambda: _of_layer(L.DepthwiseConv2D(3, depth_multiplier=2), 6, 5, 2),
    "transposed": lambda: _of_layer(L.Conv2DTranspose(2, 3, strides=2, padding="same"), 4, 3, 2),
    "batch": lambda: _of_layer(L.BatchNormalization(), 4, 3),
    "shared dense": lambda: _used_twice(L.Dense(2)),
    "shared scale and shift": lambda: _used_twice(L.LayerNormalization()),
}


def _setting(name, weights, **settings):
    model = NETWORKS[name]()
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(B, *i.shape[1:])).astype("float32") for i in model.inputs]
    x = x if len(x) > 1 else x[0]
    batch = Batch(x, np.zeros((B, model.output_shape[-1]), "float32"), weights)
    optimizer = KFAC(labels="exact", **settings)
    optimizer.bind(find_blocks(model).blocks)
    optimizer.build(model.trainable_variables)
    return batch, CurvatureEstimator(model, CompiledObjective(model)), optimizer


def _directions(optimizer):
    rng = np.random.default_rng(1)
    shapes = [v.shape for v in optimizer.block_variables]
    return [[tf.constant(rng.normal(size=s), tf.float32) for s in shapes] for _ in range(2)]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weights"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_average_is_the_gauss_newton_matrix(name, weights):
    batch, estimator, optimizer = _setting(name, weights)
    look = estimator.look(batch, optimizer.blocks, "exact", training=True)
    optimizer.update_factors(optimizer.statistics(look))
    directions = _directions(optimizer)
    variables = optimizer.block_variables
    expected = to_numpy(estimator.quadratic_form(batch, variables, directions, is_whole=True))
    got = to_numpy(optimizer._curvature.form(directions))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["rows", "einsum that swaps", "shared dense"])
def test_moments_are_those_of_whole_examples(name):
    """With labels of the data the one probe's gradient of an example is that of its loss."""
    batch, estimator, optimizer = _setting(name, None, inverse="ekfac")
    network, state = estimator.network, optimizer._curvature.states[0]
    look = estimator.look(batch, optimizer.blocks, "data", training=True)
    optimizer.update_factors(optimizer.statistics(look))
    got = to_numpy(state.statistics(look)[-1])
    basis_a, basis_g = (to_numpy(f.vectors[0]).astype("float64") for f in (state.a, state.g))
    expected = 0.0
    for k in range(B):
        alone = keras.tree.map_structure(lambda part, k=k: part[k : k + 1], batch.x)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(network(alone)))
        gradient = tape.gradient(loss, [v.value for v in state.block.variables])
        matrix = to_numpy(state.block.to_matrix(gradient)).astype("float64")
        # The loss averages over D outputs, the likelihood adds them up.
        expected += network.output_shape[-1] * (basis_a.T @ matrix @ basis_g) ** 2 / B
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * expected.max())
