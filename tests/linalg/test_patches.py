"""Convolution patches against Keras' convolutions and an index-by-index reference."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.linalg import conv_patches

CONV_OF_RANK = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}
SPATIAL_SHAPE = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}
CASES = [
    (rank, size, stride, padding, rate)
    for rank in (1, 2, 3)
    for size, stride, padding, rate in [
        ((1, 1, 1), 1, "valid", 1),
        ((3, 2, 2), 1, "valid", 1),
        ((3, 2, 2), 1, "same", 1),
        ((2, 3, 1), 2, "same", 1),
        ((3, 3, 3), 3, "valid", 1),
        ((2, 2, 2), 3, "same", 1),
        ((2, 3, 2), 1, "valid", 2),
        ((3, 2, 2), 1, "same", 2),
    ]
] + [(1, (3,), 1, "causal", 1), (1, (3,), 1, "causal", 2), (1, (3,), 2, "causal", 1)]


def layer_and_input(rank, size, stride, padding, rate):
    x = np.random.default_rng(0).normal(size=(2, *SPATIAL_SHAPE[rank], 3))
    layer = CONV_OF_RANK[rank](
        4, size[:rank], stride, padding, dilation_rate=rate, use_bias=False, dtype="float64"
    )
    layer.build(x.shape)
    return layer, x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patches_times_reshaped_kernel_equals_the_convolution(case):
    rank, size, stride, padding, rate = case
    layer, x = layer_and_input(*case)
    patches = conv_patches(keras.ops.convert_to_tensor(x), size[:rank], stride, padding, rate)
    kernel = keras.ops.reshape(layer.kernel, (-1, 4))
    expected = keras.ops.reshape(layer(x), (2, -1, 4))
    np.testing.assert_allclose(patches @ kernel, expected, rtol=0, atol=1e-12)


def test_entries_follow_the_kernels_row_major_order():
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 3))
    patches = keras.ops.convert_to_numpy(conv_patches(x, (2, 3), (2, 1), "valid", (1, 2)))
    assert patches.shape == (2, 2 * 2, 2 * 3 * 3)
    for b, i, j, u, v, c in itertools.product(*map(range, (2, 2, 2, 2, 3, 3))):
        expected = x[b, 2 * i + u, j + 2 * v, c]
        assert patches[b, 2 * i + j, (u * 3 + v) * 3 + c] == expected


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_sizes_unknown_at_trace_time_give_the_same_patches(stride, padding):
    x = np.random.default_rng(2).normal(size=(2, 8, 7, 3))
    traced = tf.function(
        lambda value: conv_patches(value, (3, 2), stride, padding),
        input_signature=[tf.TensorSpec((None, None, None, 3), tf.float64)],
    )
    np.testing.assert_array_equal(traced(x), conv_patches(x, (3, 2), stride, padding))


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding", "named"),
    [((3,), 1, "valid", "kernel_size"), ((3, 3), 0, "same", "strides"), ((3, 3), 1, "x", "pad")],
)
def test_arguments_that_do_not_fit_are_named(kernel_size, strides, padding, named):
    with pytest.raises(InvalidArgumentError, match=named):
        conv_patches(np.zeros((1, 5, 5, 2)), kernel_size, strides, padding)
