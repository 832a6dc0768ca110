"""Translation to tf_keras: equal outputs, or a refusal that names the layer."""

from __future__ import annotations

import importlib.util

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tests.keras_features import needs_argument
from tf_kfacprune.errors import ParityError, UnsupportedModelError

# Looked for, not imported: importing it changes the process, see `tf_kfacprune.tfmot.legacy`.
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow_model_optimization") is None,
        reason="needs the extra: pip install .[tfmot]",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*NumPy.*"),
]
L = keras.layers
SLOW = ("MobileNetV3Small", "DenseNet121")


def randomized(model):
    """Weights that no default could hit, positive where they are variances."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "seed" not in weight.path and "count" not in weight.path:
            weight.assign(rng.uniform(0.1, 0.5, weight.shape))
    return model


@pytest.mark.parametrize(
    "layer",
    [
        L.Activation("relu"),
        L.Activation("silu"),
        L.Activation("hard_silu"),
        L.Activation("hard_sigmoid"),
        L.Activation("relu6"),
        L.Activation("leaky_relu"),
        L.Activation("gelu"),
        L.AveragePooling2D(2, padding="same"),
        L.BatchNormalization(momentum=0.9, epsilon=1e-2),
        L.BatchNormalization(center=False, scale=False),
        L.Conv2D(3, 3, dilation_rate=2, activation="hard_silu", kernel_regularizer="l2"),
        L.Conv2D(4, 3, strides=2, padding="same", groups=2, use_bias=False),
        L.Conv2DTranspose(3, 3, strides=2),
        L.Cropping2D(1),
        L.Dense(5, activation="softmax", kernel_constraint="non_neg"),
        L.DepthwiseConv2D(3, depth_multiplier=2, activation="relu6"),
        L.Dropout(0.5, seed=1),
        L.ELU(0.5),
        L.Flatten(),
        L.GlobalAveragePooling2D(keepdims=True),
        L.GlobalMaxPooling2D(),
        L.LayerNormalization(epsilon=1e-2),
        L.LeakyReLU(negative_slope=0.3),
        L.MaxPooling2D(3, 1),
        L.Normalization(mean=[0.1, 0.2, 0.3, 0.4], variance=[1.0, 2.0, 3.0, 4.0]),
        L.PReLU(shared_axes=[1, 2]),
        L.Permute((2, 1, 3)),
        L.ReLU(max_value=6.0, negative_slope=0.1),
        L.Rescaling(2.0, -1.0),
        L.Reshape((4, 8, 8)),
        L.SeparableConv2D(3, 3, depth_multiplier=2),
        L.Softmax(),
        L.SpatialDropout2D(0.5),
        L.UpSampling2D(2),
        L.ZeroPadding2D(((0, 1), (0, 1))),
    ],
    ids=lambda layer: layer.name,
)
def test_every_layer_is_equal_with_random_weights(layer):
    x = keras.Input((8, 8, 4), name="x")
    model = randomized(keras.Model(x, layer(x)))
    translated = kp.tfmot.to_tf_keras(model)
    data = np.random.default_rng(1).normal(size=(3, 8, 8, 4)).astype("float32")
    np.testing.assert_allclose(
        translated(data), keras.ops.convert_to_numpy(model(data)), rtol=1e-4, atol=1e-5
    )


def test_merges_operations_sharing_and_nesting_are_equal():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner_in = keras.Input((4,))
    inner = keras.Model(inner_in, L.Dense(4, name="inside")(inner_in), name="inner")
    shared = L.Dense(4, name="shared")
    y = L.Concatenate()([shared(a), shared(b), inner(a), L.Subtract()([a, b])])
    z = (y + 3.0) * 0.5 - 1.0
    model = keras.Model([a, b], [z * y, z / 2.0 + y], name="net")
    translated = kp.tfmot.to_tf_keras(randomized(model))
    names = {layer.name for layer in translated.layers}
    assert {"shared", "inner_inside", "a", "b"} <= names


@pytest.mark.parametrize(
    "name", ["MobileNetV2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_applications_are_translated_and_annotated(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=5)
    report = kp.tfmot.quantization_report(model)
    floating = {layer.kind for layer in report.floating}
    expected = {
        "MobileNetV2": set(),
        "MobileNetV3Small": {"Multiply", "Rescaling"},
        "DenseNet121": {"BatchNormalization"},
    }
    assert floating == expected[name]


def own_layer():
    class Own(L.Layer):
        def call(self, x):
            return x * 2.0

    return Own(name="own")


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (own_layer(), r"'own' \(Own\) has no counterpart"),
        (L.GroupNormalization(2, name="group"), r"'group' \(GroupNormalization\)"),
        (L.Activation("mish", name="odd"), r"'odd' \(Activation\) has an activation"),
        (L.Dense(2, dtype="mixed_float16", name="half"), r"'half'.*float16"),
        (L.Lambda(lambda x: x, name="anything"), r"'anything' \(Lambda\)"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_cannot_be_translated_is_named(layer, said):
    x = keras.Input((4, 4, 4), name="x")
    with pytest.raises(UnsupportedModelError, match=said):
        kp.tfmot.to_tf_keras(keras.Model(x, layer(x)))


@needs_argument(L.BatchNormalization, "renorm")
def test_normalization_with_corrections_is_named():
    x = keras.Input((4, 4, 4), name="x")
    y = L.BatchNormalization(renorm=True, name="bn")(x)
    with pytest.raises(UnsupportedModelError, match=r"'bn'.*renorm=True"):
        kp.tfmot.to_tf_keras(keras.Model(x, y))


def test_unknown_operation_and_integer_input_are_named():
    x = keras.Input((4,), name="x")
    with pytest.raises(UnsupportedModelError, match=r"Operation '\w+' \(Erfinv\)"):
        kp.tfmot.to_tf_keras(keras.Model(x, keras.ops.erfinv(x)))
    with pytest.raises(UnsupportedModelError, match=r"\(Subtract\) is an operation"):
        kp.tfmot.to_tf_keras(keras.Model(x, 1.0 - x))
    tokens = keras.Input((4,), dtype="int32", name="tokens")
    with pytest.raises(UnsupportedModelError, match="'tokens' is of dtype int32"):
        kp.tfmot.to_tf_keras(keras.Model(tokens, L.Embedding(9, 2)(tokens)))


def test_difference_of_outputs_is_found(monkeypatch):
    from tf_kfacprune.tfmot import translation

    monkeypatch.setattr(translation, "_copy_weights", lambda call, translated: None)
    x = keras.Input((4,), name="x")
    with pytest.raises(ParityError, match="differs at output 0: relative error"):
        kp.tfmot.to_tf_keras(keras.Model(x, L.Dense(3)(x)))
