"""Random graphs of supported operations with random gates: the compact model equals the gated."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

from tf_kfacprune.compaction import compact, parity_error, random_inputs
from tf_kfacprune.gates import GatedNetwork, insert_gates

EPSILON = 0.1  # in normalizations; a small one amplifies rounding where few channels are left
ACTIVATIONS = ("relu", "sigmoid", "gelu", "softplus", None)

# A graph is a list of steps; each appends a tensor made from one or two earlier ones.
STEP = st.tuples(
    st.sampled_from(
        [
            *("conv", "conv1", "grouped", "depthwise", "separable", "transposed", "batchnorm"),
            *("activation", "softmax", "pool", "pad", "heads", "scalar", "shared"),
            *("layernorm", "rmsnorm", "unitnorm", "groupnorm", "onegroup"),
            *("recurrent", "bidirectional", "attention", "groupquery", "scores"),
            *("add", "concat", "multiply", "excite", "slice", "split", "strided", "constant"),
            *("spectral", "augment", "masking", "dot", "square", "turn"),
        ]
    ),
    st.integers(0, 100),  # which earlier tensor
    st.integers(0, 100),  # which other earlier tensor
    st.integers(2, 6),  # channels
    st.sampled_from(ACTIVATIONS),
)


def project(x, like):
    """Brings a tensor to the channels of another."""
    return x if x.shape == like.shape else layers.Conv2D(like.shape[-1], 1)(x)


def table(channels):
    return np.cos(np.arange(4 * channels, dtype="float32").reshape(4, channels))


def turned(x):
    """Channels turned in pairs, by an angle for each position."""
    first, second = ops.split(x, 2, axis=-1)
    cos, sin = (np.tile(table(x.shape[-1] // 2) + shift, 2) for shift in (0.0, 0.3))
    return x * cos + ops.concatenate([-second, first], axis=-1) * sin


def as_sequences(layer, *images):
    """Calls a sequence layer on images row by row."""
    made = layer(*[layers.Reshape((16, x.shape[-1]))(x) for x in images])
    return layers.Reshape((4, 4, made.shape[-1]))(made)


def apply(kind, x, other, channels, activation, shared):
    size = x.shape[-1]
    simple = {
        "conv": lambda: layers.Conv2D(channels, 3, padding="same", activation=activation)(x),
        "conv1": lambda: layers.Conv2D(channels, 1, activation=activation)(x),
        "grouped": lambda: layers.Conv2D(4 * channels, 3, padding="same", groups=2)(
            layers.Conv2D(2 * channels, 1, activation=activation)(x)
        ),
        "depthwise": lambda: layers.DepthwiseConv2D(
            3, padding="same", depth_multiplier=1 + channels % 2, activation=activation
        )(x),
        "separable": lambda: layers.SeparableConv2D(channels, 3, padding="same")(x),
        "transposed": lambda: layers.Conv2DTranspose(channels, 3, padding="same")(x),
        "batchnorm": lambda: layers.BatchNormalization()(x),
        "activation": lambda: layers.Activation(activation)(x),
        "softmax": lambda: layers.Softmax()(x),
        "layernorm": lambda: layers.LayerNormalization(epsilon=EPSILON)(x),
        "rmsnorm": lambda: layers.RMSNormalization(epsilon=EPSILON)(x),
        "unitnorm": lambda: layers.UnitNormalization()(x),
        "groupnorm": lambda: layers.GroupNormalization(
            groups=2 if size % 2 == 0 else -1, epsilon=EPSILON
        )(x),
        "onegroup": lambda: layers.GroupNormalization(groups=1, epsilon=EPSILON)(x),
        "recurrent": lambda: as_sequences(
            (layers.SimpleRNN, layers.LSTM, layers.GRU)[channels % 3](
                channels, return_sequences=True, go_backwards=activation == "relu"
            ),
            x,
        ),
        "bidirectional": lambda: as_sequences(
            layers.Bidirectional(
                layers.GRU(channels, return_sequences=True),
                merge_mode=("concat", "sum", "mul", "ave")[channels % 4],
            ),
            x,
        ),
        "attention": lambda: as_sequences(
            layers.MultiHeadAttention(channels % 3 + 1, channels, value_dim=3, output_shape=4),
            x,
            other,
        ),
        "groupquery": lambda: (
            as_sequences(layers.GroupQueryAttention(3, channels, 2), x, x)
            if channels % 2 == 0
            else as_sequences(layers.GroupQueryAttention(3, 2, 1), x, x)
        ),
        "scores": lambda: as_sequences(
            lambda a, b: layers.Attention()([a, b]), x, project(other, x)
        ),
        "pool": lambda: layers.AveragePooling2D(2, strides=1, padding="same")(x),
        "pad": lambda: layers.Cropping2D(1)(layers.ZeroPadding2D(1)(x)),
        "heads": lambda: layers.Reshape((4, 4, size))(
            layers.Permute((2, 1, 3))(layers.Reshape((4, 4, size))(x))
        ),
        "scalar": lambda: 1.5 - 0.5 * x,
        "shared": lambda: shared(project(x, keras.KerasTensor((None, 4, 4, 4)))),
        "add": lambda: layers.Add()([x, project(other, x)]),
        "concat": lambda: layers.Concatenate()([x, other]),
        "multiply": lambda: x * project(other, x),
        "slice": lambda: x[..., 1:],
        "strided": lambda: layers.Concatenate()([x[..., ::2], x[..., ::-2]]),
        "constant": lambda: x * np.linspace(0.5, 1.5, size, dtype="float32") + table(size),
        "spectral": lambda: layers.SpectralNormalization(
            layers.Conv2D(channels, 3, padding="same", activation=activation)
        )(x),
        "augment": lambda: (layers.RandomFlip, layers.RandomInvert)[channels % 2]()(x),
        "masking": lambda: as_sequences(
            lambda y: layers.GRU(channels, return_sequences=True)(
                layers.Masking()(layers.ReLU()(y - 0.5))
            ),
            x,
        ),
        "dot": lambda: as_sequences(
            lambda a, b: layers.Dot(axes=2, normalize=channels % 2 == 0)([a, b]),
            x,
            project(other, x),
        ),
        "square": lambda: as_sequences(lambda y: ops.einsum("bqc,bkc->bqk", y, y), x),
        "turn": lambda: turned(x if size % 2 == 0 else layers.Conv2D(2 * channels, 1)(x)),
        "split": lambda: layers.Concatenate()(keras.ops.split(x, [size // 2], axis=-1)[::-1]),
        "excite": lambda: layers.Multiply()(
            [
                x,
                layers.Dense(size, activation="sigmoid")(
                    layers.Dense(channels, activation="relu")(
                        layers.GlobalAveragePooling2D(keepdims=True)(x)
                    )
                ),
            ]
        ),
    }
    return simple[kind]()


def build(steps):
    inputs = keras.Input((4, 4, 3))
    shared = layers.Conv2D(4, 3, padding="same", activation="relu")
    tensors = [layers.Conv2D(5, 3, padding="same", activation="relu")(inputs)]
    for kind, first, second, channels, activation in steps:
        x, other = tensors[-1 - first % len(tensors)], tensors[-1 - second % len(tensors)]
        tensors.append(apply(kind, x, other, channels, activation, shared))
    heads = [layers.Dense(2)(layers.Flatten()(tensors[-1]))]
    if len(tensors) > 2:
        heads.append(layers.Dense(3)(layers.GlobalMaxPooling2D()(tensors[-2])))
    return keras.Model(inputs, heads)


def randomize(model, rng):
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in ("beta", "moving_mean", "bias"):
            weight.assign(rng.normal(size=weight.shape))
        elif kind in ("gamma", "moving_variance", "scale"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))


# Masks end at layers that do not support them.
@pytest.mark.filterwarnings("ignore:.*was passed an input with a mask:UserWarning")
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    steps=st.lists(STEP, min_size=1, max_size=7),
    hard=st.booleans(),
    features=st.booleans(),
    seed=st.integers(0, 99),
)
def test_compact_equals_gated_on_random_graphs(steps, hard, features, seed):
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = build(steps)
    randomize(model, rng)
    # Inputs are gated so that something can always be pruned.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prune_features=True changes nothing")
        gated = insert_gates(model, prune_inputs=True, prune_features=features)
    x = random_inputs(model, batch_size=4)
    assert parity_error(model(x, training=False), gated(x, training=False)) == 0
    (bank,) = GatedNetwork(gated).sources
    values = rng.uniform(0.2, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.6)
    bank.set_values((values > 0).astype("float32") if hard else values)
    small = compact(gated, verify=False)
    assert parity_error(gated(x, training=False), small(x, training=False)) <= 1e-5
    network = GatedNetwork(gated)
    assert small.count_params() == network.cost.count("params", network.kept_neurons())
