"""One small model per operation that moves, joins, cuts or resizes: compact equals gated."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_kfacprune.compaction import compact, parity_error
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import analyze


def image(body, filters=6, size=(8, 8), **kwargs):
    """A convolution, the operation under test, and a reader of what it makes."""
    inputs = keras.Input((*size, 3))
    x = layers.Conv2D(filters, 3, padding="same", activation="tanh", name="first")(inputs)
    x = body(x)
    x = layers.Conv2D(4, 1, activation="relu")(x) if len(x.shape) == 4 else layers.Dense(4)(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)), **kwargs)


def sequence(body, filters=6):
    inputs = keras.Input((9, 3))
    x = body(layers.Conv1D(filters, 3, padding="causal", activation="relu")(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.Dense(4)(x))))


def volume(body):
    inputs = keras.Input((5, 5, 5, 2))
    x = body(layers.Conv3D(5, 2, dilation_rate=2, activation="relu")(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.Conv3D(3, 1)(x))))


def stacked(axis):
    def body(x):
        y = layers.Conv2D(6, 1)(x)
        z = ops.stack([x, ops.sin(y)], axis=axis)
        return ops.max(z, axis=axis)

    return lambda: image(body)


def flattened_stack():
    return image(lambda x: ops.reshape(ops.stack([x, layers.Conv2D(6, 1)(x)], axis=1), (-1, 768)))


def unstacked(x):
    rows = ops.unstack(x, axis=1)
    return ops.concatenate([rows[0] + rows[3], rows[5]], axis=1)


def excited(x):
    s = layers.Dense(3, activation="relu")(layers.GlobalAveragePooling2D()(x))
    s = layers.Dense(6, activation="hard_sigmoid")(s)
    return x * ops.expand_dims(ops.expand_dims(s, 1), 1)


def separable_1d(x):
    x = layers.DepthwiseConv1D(3, depth_multiplier=2, activation="relu")(x)
    return layers.SeparableConv1D(5, 2, dilation_rate=2)(x)


def transposed_1d(x):
    return layers.Conv1DTranspose(5, 3, strides=2, output_padding=1, activation="relu")(x)


def transposed_2d(x):
    x = layers.Conv2DTranspose(5, 3, strides=2, output_padding=(1, 0), activation="relu")(x)
    return layers.Conv2DTranspose(4, 2, padding="same")(x)


def dilated(x):
    x = layers.Conv2D(5, 3, dilation_rate=(2, 1), padding="same", activation="relu")(x)
    x = layers.DepthwiseConv2D(3, dilation_rate=2, padding="same")(x)
    return layers.SeparableConv2D(7, 3, dilation_rate=2)(x)


def operators(x):
    y = layers.Conv2D(6, 1)(x)
    x = ops.where(x > y, x, -0.5 * y) + 1.0
    x = ops.maximum(x, 2.0 - y) / (1.0 + ops.square(y))
    return ops.arctan(abs(x) ** 1.5 - ops.clip(y, -1.0, 0.5))


def resized(x):
    x = layers.Resizing(5, 6)(layers.CenterCrop(7, 6)(x))
    return layers.AdaptiveAveragePooling2D((3, 2))(x) - layers.AdaptiveMaxPooling2D((3, 2))(x)


def pooled(x):
    return ops.max_pool(x, 2, 1, "same") - ops.average_pool(x, 2, 1, "same")


def constants(x):
    rng = np.random.default_rng(0)
    one = ops.convert_to_tensor(rng.normal(size=(8, 8, 6)).astype("float32"))
    y = x * np.arange(1.0, 7.0, dtype="float32") - one
    return ops.where(rng.uniform(size=(8, 1, 6)) < 0.5, y, ops.maximum(y, one))


def every_other(x):
    return ops.concatenate([x[..., ::2] * x[..., 1::2], x[..., ::-1][..., :4:3]], axis=-1)


def pixels_from_channels(x):
    blocks = ops.reshape(layers.Conv2D(20, 1)(x), (-1, 8, 8, 2, 2, 5))
    return ops.reshape(ops.transpose(blocks, (0, 1, 3, 2, 4, 5)), (-1, 16, 16, 5))


def extremes(x):
    largest = ops.max(x, axis=-1, keepdims=True)
    return x / (1.0 + ops.square(largest)) - ops.min(ops.exp(x), axis=(1, 3), keepdims=True)


CASES = {
    "array constants": lambda: image(constants),
    "slices with steps": lambda: image(every_other, filters=8),
    "stack in front": stacked(1),
    "stack in between": stacked(3),
    "stack behind": stacked(-1),
    "stack, then flatten": flattened_stack,
    "unstack positions": lambda: image(unstacked),
    "flip channels": lambda: image(lambda x: ops.flip(layers.Conv2D(5, 1)(ops.flip(x, -1)), 1)),
    "pad positions": lambda: image(lambda x: ops.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]])),
    "prelu, one slope per channel": lambda: image(layers.PReLU(shared_axes=[1, 2])),
    "prelu, one slope per element": lambda: image(layers.PReLU()),
    "squeeze and excite": lambda: image(excited),
    "split at indices": lambda: image(
        lambda x: ops.concatenate(ops.split(x, [2, 4], axis=-1)[::-1], axis=-1)
    ),
    "slices of channels": lambda: image(lambda x: x[..., :3] * x[:, :, :, -3:]),
    "slices of positions": lambda: image(lambda x: x[:, 1:, 2]),
    "depth to space": lambda: image(
        lambda x: ops.depth_to_space(ops.tanh(layers.Conv2D(20, 1)(x)), 2)
    ),
    "depth to space by reshapes": lambda: image(pixels_from_channels),
    "space to depth": lambda: image(lambda x: ops.space_to_depth(x, 2)),
    "largest and smallest over channels": lambda: image(extremes),
    "raw operators": lambda: image(operators),
    "resizing": lambda: image(resized),
    "pooling operators": lambda: image(pooled),
    "transposed 2D": lambda: image(transposed_2d),
    "dilated": lambda: image(dilated),
    "transposed 1D": lambda: sequence(transposed_1d),
    "separable 1D": lambda: sequence(separable_1d),
    "transposed 3D": lambda: volume(layers.Conv3DTranspose(4, 2, strides=2)),
    "pooled 3D": lambda: volume(layers.MaxPooling3D(2)),
}


@pytest.mark.parametrize("case", CASES)
def test_compact_equals_gated(case, assert_exact):
    model = CASES[case]()
    assert_exact(model)
    frozen = {record.layer for record in analyze(model).frozen}
    assert frozen == {model.layers[-1].name}


def test_names_of_operations_stay_apart_in_a_process_that_did_not_make_the_model():
    gated = insert_gates(image(lambda x: every_other(constants(x)) * np.ones(5, "float32"), 6))
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(np.arange(bank.size) % 3 > 0)
    keras.backend.clear_session()  # the counts of names begin anew
    compact(gated)


def test_images_of_any_size_are_compacted():
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(6, 3, strides=2, activation="relu")(inputs)
    x = layers.UpSampling2D()(layers.Conv2D(5, 3, padding="same")(x))
    x = ops.depth_to_space(layers.Conv2D(12, 3, activation="relu")(x), 2)
    model = keras.Model(inputs, layers.Conv2D(2, 1)(x))
    assert analyze(model).num_neurons == 6 + 5 + 12 // 4
    gated = insert_gates(model)
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(np.arange(bank.size) % 2)
    small = compact(gated)
    rng = np.random.default_rng(0)
    for shape in ((2, 9, 12, 3), (1, 30, 7, 3)):
        x = rng.normal(size=shape).astype("float32")
        assert parity_error(gated(x), small(x)) < 1e-5


def test_masks_reach_the_layers_behind():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True, name="embedding")(tokens)
    x = layers.Dropout(0.1)(layers.Dense(7, activation="relu", name="dense")(x))
    x = layers.GlobalAveragePooling1D()(layers.Add()([x, layers.Dense(7)(x)]))
    model = keras.Model(tokens, layers.Dense(2)(x))
    gated = insert_gates(model)
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(np.arange(bank.size) % 3 > 0)
    data = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 1]])
    small = compact(gated, verify_data=data)
    unmasked = np.array([[1, 2, 3, 4, 4, 4], [4, 5, 6, 7, 8, 1]])
    assert parity_error(small(data)[:1], small(unmasked)[:1]) > 1e-3


def test_padded_channels_and_unstacked_channels_are_frozen():
    padded = image(lambda x: ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, 2]]))
    assert "first" in {record.layer for record in analyze(padded).frozen}
    picked = image(lambda x: ops.unstack(x, axis=-1)[2])
    assert "first" in {record.layer for record in analyze(picked).frozen}
