"""Second derivatives by two tapes are those of finite differences, and nothing else changes.

Finite differences are taken of first derivatives of plain Keras, which are right, in float64. So
neither side of the comparison knows of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.keras_features import needs_argument
from tf_kfacprune.curvature import capture, find_blocks
from tf_kfacprune.curvature.second_derivatives import (
    check_second_derivatives,
    second_derivative_faults,
)
from tf_kfacprune.curvature.twice_differentiable import mends, twice_differentiable
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import insert_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*rms_scaling=True.*deprecated")

STEP = 1e-5
SEQUENCE, IMAGE = (5, 4), (5, 5, 4)
DOUBLE = {"dtype": "float64"}


# --- measuring ----------------------------------------------------------------------------------


def objective(y):
    y = tf.cast(y, tf.float64)
    return tf.reduce_mean(tf.sin(y) + 0.3 * y**3)


def flat(tensors):
    return np.concatenate([np.ravel(tf.convert_to_tensor(t)) for t in tensors])


def weights_of(model):
    """All trainable variables but those of gates."""
    return [v for v in model.trainable_variables if not v.path.endswith("parameters")]


def gradient(model, x, training):
    variables = [v.value for v in weights_of(model)]
    with tf.GradientTape() as tape:
        value = objective(model(x, training=training))
    return tape.gradient(value, variables)


def product(model, x, direction, training):
    """Hessian times a direction in the space of the weights, by two tapes."""
    variables = [v.value for v in weights_of(model)]
    with tf.GradientTape() as tape:
        parts = zip(gradient(model, x, training), direction, strict=True)
        along = tf.add_n([tf.reduce_sum(g * v) for g, v in parts])
    return flat(tape.gradient(along, variables, unconnected_gradients="zero"))


def differences(model, x, direction, training):
    """The same by central differences of first derivatives of plain Keras."""
    variables = weights_of(model)
    values = [v.numpy() for v in variables]
    sides = []
    for step in (STEP, -STEP):
        for variable, w, v in zip(variables, values, direction, strict=True):
            variable.assign(w + step * v)
        sides.append(flat(gradient(model, x, training)))
    for variable, w in zip(variables, values, strict=True):
        variable.assign(w)
    return (sides[0] - sides[1]) / (2 * STEP)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def state_of(model):
    return [v.numpy() for v in model.non_trainable_variables]


def restore(model, state):
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)


def randomized(model, seed=0):
    """The model with weights that are not at their special first values, and a direction."""
    rng = np.random.default_rng(seed)
    for variable in model.non_trainable_variables:
        if "moving" in variable.path:
            variable.assign(0.5 + rng.uniform(size=variable.shape))
    for variable in weights_of(model):
        variable.assign(0.5 * rng.normal(size=variable.shape))
    return model, [rng.normal(size=v.shape) for v in weights_of(model)]


def model_with(*parts, shape=IMAGE, dtype="float64"):
    """A contraction, the parts, and another contraction."""
    x = inputs = keras.Input(shape, dtype="float64" if dtype == "float64" else "float32")
    x = layers.Dense(4, dtype=dtype)(x)
    for part in parts:
        x = part(x)
    return keras.Model(inputs, layers.Dense(3, dtype=dtype)(x))


# --- layers -------------------------------------------------------------------------------------


def masked():
    """A mask that hides two of five positions of every other example, and what honours it."""

    class Masking(keras.Layer):
        def compute_mask(self, inputs, previous_mask=None):
            hidden = np.zeros((4, 5), bool)
            hidden[::2, 3:] = True
            return tf.constant(~hidden)

        def call(self, x):
            return x

    return [Masking(**DOUBLE), layers.BatchNormalization(**DOUBLE)]


WRONG, RIGHT, MISSING = "wrong", "right", "missing"  # what plain Keras is
TRAINING, INFERENCE = True, False


def of(build, shape=IMAGE, training=INFERENCE, keras_is=WRONG):
    """One case: the parts of the model, as many as there are, and what is expected."""
    return build, shape, training, keras_is


def normalized(layer, **options):
    return lambda: [layer(**options, **DOUBLE)]


def softsign_gru():
    gru = layers.GRU(2, "softsign", "softsign", return_sequences=True, **DOUBLE)
    return [layers.Bidirectional(gru, **DOUBLE)]


def nested():
    return [
        keras.Sequential([keras.Input(SEQUENCE, **DOUBLE), layers.LayerNormalization(**DOUBLE)])
    ]


def each_step():
    return [layers.TimeDistributed(layers.BatchNormalization(**DOUBLE), **DOUBLE)]


BATCH, LAYER = layers.BatchNormalization, layers.LayerNormalization
GROUP = layers.GroupNormalization
CASES = {
    "batch": of(normalized(BATCH), training=TRAINING),
    "batch, axis": of(normalized(BATCH, axis=1, scale=False), training=TRAINING),
    "batch, bare": of(normalized(BATCH, center=False, scale=False), (4,), TRAINING),
    "batch, masked": of(masked, SEQUENCE, TRAINING, RIGHT),
    "batch, synchronized": of(
        normalized(BATCH, synchronized=True), training=TRAINING, keras_is=RIGHT
    ),
    "batch, inference": of(normalized(BATCH), keras_is=RIGHT),
    "batch, frozen": of(normalized(BATCH, trainable=False), training=TRAINING, keras_is=RIGHT),
    "batch, each step": of(each_step, SEQUENCE, TRAINING),
    "layer": of(normalized(LAYER), SEQUENCE),
    "layer, axes": of(normalized(LAYER, axis=[1, 2], center=False)),
    "layer, axis": of(normalized(LAYER, axis=1, scale=False), SEQUENCE),
    "layer, rms scaling": of(normalized(LAYER, rms_scaling=True), SEQUENCE, keras_is=RIGHT),
    "layer, nested": of(nested, SEQUENCE),
    "layer, operation": of(lambda: [keras.ops.layer_normalization], SEQUENCE),
    "group": of(normalized(GROUP, groups=2), training=TRAINING),
    "group, axis": of(normalized(GROUP, groups=5, axis=1, scale=False)),
    "group, one": of(normalized(GROUP, groups=1, axis=-2, center=False)),
    "variance": of(lambda: [lambda x: keras.ops.moments(x, [1, -1], keepdims=True)[1]], SEQUENCE),
    "mean": of(lambda: [lambda x: x * keras.ops.moments(x, 0)[0]], SEQUENCE, keras_is=RIGHT),
    "rms": of(normalized(layers.RMSNormalization), SEQUENCE, keras_is=RIGHT),
    "unit": of(normalized(layers.UnitNormalization), SEQUENCE, keras_is=RIGHT),
    "softsign": of(lambda: [layers.Dense(4, "softsign", **DOUBLE)], SEQUENCE, keras_is=MISSING),
    "softsign, operation": of(lambda: [keras.ops.softsign], SEQUENCE, keras_is=MISSING),
    "softsign, other name": of(
        normalized(layers.Activation, activation=keras.ops.softsign), SEQUENCE, keras_is=MISSING
    ),
    "softsign, recurrent": of(softsign_gru, SEQUENCE, keras_is=MISSING),
}


@dataclass
class Measured:
    """What one case gave."""

    plain: np.ndarray
    value: np.ndarray
    differences: np.ndarray
    product: np.ndarray
    plain_product: np.ndarray | None
    state: list[np.ndarray]
    state_after: list[np.ndarray]
    expected: str


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    build, shape, training, expected = request.param
    model, direction = randomized(model_with(*build(), shape=shape))
    x = np.random.default_rng(1).normal(size=(4, *shape))
    state = state_of(model)
    with twice_differentiable(model):
        value = model(x, training=training)
        found = product(model, x, direction, training)
    after = state_of(model)
    plain = model(x, training=training)
    finite = differences(model, x, direction, training)
    try:
        plain_product = product(model, x, direction, training)
    except LookupError:
        plain_product = None
    return Measured(
        plain.numpy(), value.numpy(), finite, found, plain_product, state, after, expected
    )


def test_values_are_those_of_keras(case):
    assert case.value.dtype == case.plain.dtype
    np.testing.assert_allclose(case.value, case.plain, rtol=0, atol=1e-13)


def test_second_derivatives_are_those_of_finite_differences(case):
    assert distance(case.product, case.differences) < 1e-6


def test_plain_keras_is_as_wrong_as_stated(case):
    if case.expected == MISSING:
        assert case.plain_product is None
    elif case.expected == WRONG:
        assert distance(case.plain_product, case.differences) > 3e-3
    else:
        assert distance(case.plain_product, case.differences) < 1e-6


def test_moving_statistics_stay(case):
    for before, after in zip(case.state, case.state_after, strict=True):
        np.testing.assert_array_equal(before, after)


def test_plain_bilinear_upsampling_is_wrong():
    model, direction = randomized(
        model_with(layers.UpSampling2D(interpolation="bilinear", **DOUBLE))
    )
    x = np.random.default_rng(1).normal(size=(4, *IMAGE))
    plain = product(model, x, direction, INFERENCE)
    with twice_differentiable(model):
        assert distance(plain, product(model, x, direction, INFERENCE)) > 0.1


# --- networks -----------------------------------------------------------------------------------


def convolutional():
    x = inputs = keras.Input((6, 6, 2), **DOUBLE)
    for filters in (3, 4):
        x = layers.Conv2D(filters, 3, use_bias=False, padding="same", **DOUBLE)(x)
        x = layers.BatchNormalization(**DOUBLE)(x)
        x = layers.ReLU(**DOUBLE)(x)
    x = layers.GlobalAveragePooling2D(**DOUBLE)(x)
    return keras.Model(inputs, layers.Dense(3, **DOUBLE)(x))


def transformer():
    x = inputs = keras.Input((5, 4), **DOUBLE)
    y = layers.LayerNormalization(**DOUBLE)(x)
    x = x + layers.MultiHeadAttention(2, 3, **DOUBLE)(y, y)
    y = layers.LayerNormalization(**DOUBLE)(x)
    y = layers.Dense(4, **DOUBLE)(layers.Dense(6, "gelu", **DOUBLE)(y))
    x = layers.GlobalAveragePooling1D(**DOUBLE)(x + y)
    return keras.Model(inputs, layers.Dense(3, **DOUBLE)(x))


def convnext():
    x = inputs = keras.Input((6, 6, 2), **DOUBLE)
    x = layers.Conv2D(4, 2, strides=2, **DOUBLE)(x)
    y = layers.DepthwiseConv2D(3, padding="same", **DOUBLE)(x)
    y = layers.LayerNormalization(epsilon=1e-6, **DOUBLE)(y)
    y = layers.Dense(4, **DOUBLE)(layers.Dense(8, "gelu", **DOUBLE)(y))
    x = layers.GlobalAveragePooling2D(**DOUBLE)(x + y)
    return keras.Model(inputs, layers.Dense(3, **DOUBLE)(x))


class Subclassed(keras.Model):
    """Layers in attributes and in a dictionary, one of them used twice."""

    def __init__(self):
        super().__init__(**DOUBLE)
        self.lift = layers.Dense(4, **DOUBLE)
        self.parts = {
            "norms": [layers.LayerNormalization(**DOUBLE), layers.BatchNormalization(**DOUBLE)]
        }

    def call(self, x, training=False):
        shared, batch = self.parts["norms"]
        x = tf.tanh(shared(self.lift(x)))
        return shared(batch(x, training=training))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6, 6, 2)))
    return model


def gated():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        model = insert_gates(transformer())
    finally:
        keras.config.set_dtype_policy(before)
    (parameters,) = [v for v in model.trainable_variables if v.path.endswith("parameters")]
    # Some of them are closed.
    parameters.assign(np.random.default_rng(2).uniform(-4, 4, parameters.shape))
    return model


NETWORKS = {f.__name__: f for f in (convolutional, transformer, convnext, subclassed, gated)}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
def test_second_derivatives_of_networks(build):
    model, direction = randomized(build())
    shape = model.input_shape[1:] if getattr(model, "inputs", None) else (6, 6, 2)
    x = np.random.default_rng(1).normal(size=(4, *shape))
    training = build is not gated  # its gates draw noise in training
    state = state_of(model)
    with twice_differentiable(model):
        value = model(x, training=training)
        found = product(model, x, direction, training)
    np.testing.assert_array_equal(flat(state_of(model) or [[]]), flat(state or [[]]))
    np.testing.assert_allclose(value, model(x, training=training), rtol=1e-11)
    expected = differences(model, x, direction, training)
    assert distance(found, expected) < 1e-6
    assert distance(product(model, x, direction, training), expected) > 1e-3


class Interpolation(keras.Layer):
    """`UpSampling2D(interpolation="bilinear")` by matrices, in float64."""

    def call(self, x):
        size = x.shape[1]
        unit = tf.reshape(tf.eye(size), (size, size, 1, 1))
        matrix = tf.cast(tf.image.resize(unit, (2 * size, 1))[..., 0, 0], x.dtype)
        return tf.einsum("bijc,iu,jv->buvc", x, matrix, matrix)


def u_net(upsampling):
    def block(x, filters):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, **DOUBLE)(x)
        return layers.Activation("tanh", **DOUBLE)(layers.BatchNormalization(**DOUBLE)(x))

    inputs = keras.Input((6, 6, 2), **DOUBLE)
    top = block(inputs, 3)
    bottom = block(layers.AveragePooling2D(2, **DOUBLE)(top), 4)
    joined = layers.Concatenate(**DOUBLE)([top, upsampling(bottom)])
    return keras.Model(inputs, layers.Conv2D(2, 1, **DOUBLE)(block(joined, 3)))


def test_second_derivatives_of_a_u_net():
    model, direction = randomized(u_net(layers.UpSampling2D(interpolation="bilinear", **DOUBLE)))
    reference, _ = randomized(u_net(Interpolation(**DOUBLE)))
    x = np.random.default_rng(1).normal(size=(4, 6, 6, 2))
    expected = differences(reference, x, direction, TRAINING)
    with twice_differentiable(reference):
        assert distance(product(reference, x, direction, TRAINING), expected) < 1e-6
    with twice_differentiable(model):  # float32 within the upsampling, as TensorFlow has it
        assert distance(product(model, x, direction, TRAINING), expected) < 1e-5
    assert distance(product(model, x, direction, TRAINING), expected) > 1e-2


# --- numbers ------------------------------------------------------------------------------------


def test_a_large_mean_costs_no_digits():
    layer = layers.BatchNormalization()
    x = 1e4 + np.random.default_rng(0).normal(size=(512, 3))
    layer.build(x.shape)
    x = x.astype("float32")
    expected = (x - x.mean(axis=0, dtype="float64")) / np.sqrt(x.var(0, dtype="float64") + 1e-3)
    with twice_differentiable(layer):
        y = layer(x, training=True)
    # x itself is good to 5e-4, but given x, c = x - mean(x) is as good as the mean.
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-3)
    square = tf.reduce_mean(tf.square(x), 0) - tf.square(tf.reduce_mean(x, 0))
    assert np.max(np.abs(square - x.var(0, dtype="float64"))) > 1


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_gives_the_values_of_keras_and_close_second_derivatives(policy):
    def build(dtype):
        parts = [
            layers.BatchNormalization(dtype=dtype),
            layers.UpSampling2D(interpolation="bilinear", dtype=dtype),
            layers.GroupNormalization(2, dtype=dtype),
            layers.LayerNormalization(dtype=dtype),
            layers.Resizing(4, 4, dtype=dtype),
        ]
        return randomized(model_with(*parts, dtype=dtype))

    model, direction = build(policy)
    direction = [v.astype("float32") for v in direction]
    x = np.random.default_rng(1).normal(size=(4, *IMAGE)).astype("float32")
    with twice_differentiable(model):
        value = model(x, training=True)
        found = product(model, x, direction, TRAINING)
    plain = model(x, training=True)
    assert value.dtype == plain.dtype
    unit = np.finfo("float16").eps if policy == "mixed_float16" else 2.0**-7
    scale = float(tf.reduce_max(tf.abs(tf.cast(plain, "float32"))))
    np.testing.assert_allclose(
        tf.cast(value, "float32"), tf.cast(plain, "float32"), rtol=0, atol=4 * unit * scale
    )
    reference, _ = build("float32")
    with twice_differentiable(reference):
        expected = product(reference, x, direction, TRAINING)
    assert distance(found, expected) < 4 * unit


def test_a_traced_function_takes_any_number_of_examples():
    parts = [
        layers.BatchNormalization(),
        layers.GroupNormalization(2),
        layers.LayerNormalization(axis=[1, -1]),
        layers.UpSampling2D(interpolation="bilinear"),
        layers.Activation("softsign"),
    ]
    model, direction = randomized(model_with(*parts, dtype="float32"))
    direction = [tf.constant(v, tf.float32) for v in direction]
    variables = [v.value for v in weights_of(model)]

    def compute(x):
        with twice_differentiable(model), tf.GradientTape() as tape:
            gradients = gradient(model, x, TRAINING)
            along = tf.add_n(
                [tf.reduce_sum(g * v) for g, v in zip(gradients, direction, strict=True)]
            )
        return [tf.convert_to_tensor(g) for g in tape.gradient(along, variables)]

    traced = tf.function(compute, input_signature=[tf.TensorSpec((None, *IMAGE))])
    for examples in (2, 5):
        x = tf.random.normal((examples, *IMAGE))
        np.testing.assert_allclose(flat(traced(x)), flat(compute(x)), rtol=1e-3, atol=1e-4)


# --- the block leaves no trace ------------------------------------------------------------------


def own_calls(model):
    return [layer for layer in model.layers if "call" in vars(layer)]


def test_layers_get_their_call_back_even_after_an_error():
    softsign = layers.Activation("softsign")
    model = model_with(
        layers.BatchNormalization(),
        layers.UpSampling2D(interpolation="bilinear"),
        softsign,
        dtype="float32",
    )
    with twice_differentiable(model):
        assert len(own_calls(model)) == 2
        assert softsign.activation is not keras.activations.softsign
    assert not own_calls(model)
    with pytest.raises(ZeroDivisionError), twice_differentiable(model):
        raise ZeroDivisionError
    assert not own_calls(model)
    assert softsign.activation is keras.activations.softsign


def test_blocks_may_be_nested():
    model, direction = randomized(model_with(*[CASES[k][0]()[0] for k in ("batch", "layer")]))
    x = np.random.default_rng(1).normal(size=(4, *IMAGE))
    with twice_differentiable(model):
        once = product(model, x, direction, TRAINING)
        with twice_differentiable(model):
            twice = product(model, x, direction, TRAINING)
    np.testing.assert_allclose(twice, once, rtol=0, atol=1e-12 * np.max(np.abs(once)))
    assert not own_calls(model)


def test_capture_records_the_layers_own_inputs_and_outputs():
    model, _ = randomized(
        model_with(
            layers.BatchNormalization(),
            layers.Dense(3, "softsign"),
            layers.LayerNormalization(),
            dtype="float32",
        )
    )
    blocks = find_blocks(model).blocks
    assert len(blocks) == 5
    x = np.random.default_rng(1).normal(size=(4, *IMAGE)).astype("float32")
    plain, records = capture(model, x, blocks, training=True)
    with twice_differentiable(model):
        value, own = capture(model, x, blocks, training=True)
        assert len(own_calls(model)) == 2
    np.testing.assert_allclose(value, plain, rtol=0, atol=1e-5)
    for ours, keras_own in zip(own, records, strict=True):
        assert ours.layer is keras_own.layer
        np.testing.assert_allclose(ours.x, keras_own.x, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.s, keras_own.s, rtol=0, atol=1e-5)


def test_spectral_normalization_keeps_its_weights():
    wrapped = layers.SpectralNormalization(layers.Dense(4, **DOUBLE), **DOUBLE)
    model, direction = randomized(model_with(wrapped, layers.LayerNormalization(**DOUBLE)))
    x = np.random.default_rng(1).normal(size=(4, *IMAGE))
    weights = flat(model.variables)
    with twice_differentiable(model):
        found = product(model, x, direction, TRAINING)
    np.testing.assert_array_equal(flat(model.variables), weights)
    assert distance(found, differences(model, x, direction, INFERENCE)) < 1e-6


# --- what is refused ----------------------------------------------------------------------------


def test_what_is_mended_is_not_refused():
    model = model_with(
        layers.BatchNormalization(),
        layers.LayerNormalization(),
        layers.GroupNormalization(2),
        layers.UpSampling2D(interpolation="bicubic"),
        layers.Resizing(4, 4),
        layers.Activation("softsign"),
        dtype="float32",
    )
    assert len(second_derivative_faults(model)) == 5
    assert len(second_derivative_faults(model, training=True)) == 6
    check_second_derivatives(model, training=True, mended=mends)


@needs_argument(layers.BatchNormalization, "renorm")
def test_what_is_not_mended_is_refused_by_name():
    class Centered(layers.LayerNormalization):
        def call(self, inputs):
            return super().call(inputs) - 1.0

    parts = [Centered(name="centered"), layers.BatchNormalization(renorm=True, name="renorm")]
    model = model_with(*parts, dtype="float32")
    with pytest.raises(UnsupportedModelError, match=r"'centered'.*'renorm'.*factors"):
        check_second_derivatives(model, training=True, mended=mends)
    check_second_derivatives(
        model_with(layers.BatchNormalization(renorm=True)), training=False, mended=mends
    )
    places = keras.Input((3,), batch_size=2)
    image = keras.Input((5,), batch_size=5)
    model = keras.Model([image, places], keras.ops.image.map_coordinates(image, places, 1))
    with pytest.raises(UnsupportedModelError, match="map_coordinates is wrong"):
        check_second_derivatives(model, training=True, mended=mends)


@needs_argument(layers.BatchNormalization, "renorm")
def test_renormalization_is_an_error_when_it_would_be_trained():
    model = model_with(layers.BatchNormalization(renorm=True, name="renorm"), dtype="float32")
    x = np.ones((2, *IMAGE), "float32")
    with twice_differentiable(model):
        model(x, training=False)
        with pytest.raises(UnsupportedModelError, match=r"'renorm'.*renorm=True"):
            model(x, training=True)
