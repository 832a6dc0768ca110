"""Kronecker factors against brute force in float64."""

import keras
import numpy as np
import pytest

from tf_kfacprune.curvature import block_for

RNG = np.random.default_rng(0)


def _brute_force_windows(x, layer):
    """Every window of a 2D convolution as a row, float64, by loops."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.strides, layer.dilation_rate
    if layer.padding == "same":
        pads = []
        for n, k, s, d in zip(x.shape[1:3], (kh, kw), (sh, sw), (dh, dw), strict=True):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
    rows = []
    for top in range(0, x.shape[1] - (kh - 1) * dh, sh):
        for left in range(0, x.shape[2] - (kw - 1) * dw, sw):
            window = x[:, top : top + (kh - 1) * dh + 1 : dh, left : left + (kw - 1) * dw + 1 : dw]
            rows.append(window.reshape(len(x), -1))
    return np.stack(rows, axis=1).astype("float64")


def _built(layer, shape):
    layer.build((None, *shape))
    return layer


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5)])
def test_dense_factors_are_second_moments_summed_and_averaged_over_locations(shape, use_bias):
    layer = _built(keras.layers.Dense(3, use_bias=use_bias), shape)
    block = block_for(layer)
    x = RNG.normal(size=(7, *shape)).astype("float32")
    g = RNG.normal(size=(7, *shape[:-1], 3)).astype("float32")
    a = x.reshape(7, -1, 5).astype("float64")
    if use_bias:
        a = np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)
    np.testing.assert_allclose(
        np.array(block.factor_a(x)), np.einsum("bti,btj->ij", a, a) / 7, rtol=1e-5, atol=1e-5
    )
    flat = g.reshape(-1, 3).astype("float64")
    np.testing.assert_allclose(
        np.array(block.factor_g(g)), flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6
    )


CONVOLUTIONS = [
    {"padding": "valid"},
    {"padding": "same"},
    {"padding": "valid", "strides": 2},
    {"padding": "same", "strides": 2, "use_bias": False},
    {"padding": "valid", "dilation_rate": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_kfc_factor_a_sums_over_locations(options):
    layer = _built(keras.layers.Conv2D(4, (3, 2), **options), (7, 6, 2))
    block = block_for(layer)
    x = RNG.normal(size=(3, 7, 6, 2)).astype("float32")
    a = _brute_force_windows(x, layer)
    if layer.use_bias:
        a = np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)
    expected = np.einsum("bti,btj->ij", a, a) / 3
    np.testing.assert_allclose(np.array(block.factor_a(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_projection_equals_patches_times_vector(options):
    layer = _built(keras.layers.Conv2D(4, (3, 2), **options), (7, 6, 2))
    block = block_for(layer)
    x = RNG.normal(size=(3, 7, 6, 2)).astype("float32")
    u = RNG.normal(size=block.n_a).astype("float32")
    expected = _brute_force_windows(x, layer) @ u[: block.n_in].astype("float64")
    expected = expected + (u[-1] if layer.use_bias else 0.0)
    projected = np.array(block.project(x, u)).reshape(3, -1)
    np.testing.assert_allclose(projected, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (keras.layers.Conv1D(3, 4, padding="causal", dilation_rate=2), (9, 2)),
        (keras.layers.Conv3D(2, 2, padding="same", strides=2), (4, 5, 4, 2)),
    ],
    ids=["causal Conv1D", "Conv3D"],
)
def test_projection_and_locations_agree_in_other_dimensions(layer, shape):
    block = block_for(_built(layer, shape))
    x = RNG.normal(size=(2, *shape)).astype("float32")
    u = RNG.normal(size=block.n_a).astype("float32")
    by_patches = np.array(block.locations(x)) @ u[: block.n_in] + u[-1]
    by_filter = np.array(block.project(x, u)).reshape(by_patches.shape)
    np.testing.assert_allclose(by_filter, by_patches, rtol=1e-4, atol=1e-4)
    kernel = keras.ops.convert_to_numpy(layer.kernel).reshape(block.n_in, block.n_out)
    output = np.array(layer(x)).reshape(2, -1, block.n_out)
    np.testing.assert_allclose(np.array(block.locations(x)) @ kernel, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_matrix_layout_round_trips_and_multiplies_like_the_layer(use_bias):
    layer = _built(keras.layers.Conv2D(4, 3, use_bias=use_bias), (5, 5, 2))
    block = block_for(layer)
    bias = RNG.normal(size=4).astype("float32") if use_bias else None
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    matrix = block.to_matrix(kernel, bias)
    assert matrix.shape == (block.n_a, block.n_out)
    kernel_back, bias_back = block.from_matrix(matrix)
    np.testing.assert_array_equal(np.array(kernel_back), kernel)
    if use_bias:
        np.testing.assert_array_equal(np.array(bias_back), bias)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (keras.layers.Conv2D(4, 3, groups=2), "grouped"),
        (keras.layers.Dense(4, trainable=False), "not trainable"),
        (keras.layers.BatchNormalization(), "no Kronecker block"),
        (keras.layers.DepthwiseConv2D(3), "no Kronecker block"),
    ],
    ids=["grouped", "frozen", "BatchNormalization", "depthwise"],
)
def test_layers_without_a_block_give_the_reason(layer, reason):
    result = block_for(_built(layer, (8, 8, 4)))
    assert isinstance(result, str)
    assert reason in result


def test_a_subclass_of_a_supported_layer_is_not_guessed():
    class MyDense(keras.layers.Dense):
        pass

    assert "MyDense" in block_for(_built(MyDense(3), (4,)))
