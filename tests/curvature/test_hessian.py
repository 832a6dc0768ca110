"""Exact curvature products against dense float64 Hessians and finite differences."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.keras_features import IS_OLD
from tf_kfacprune.curvature import Batch, SingleObjective
from tf_kfacprune.curvature.diagnostics import CurvatureOperator, hessian_spectrum
from tf_kfacprune.errors import DataError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.gates import GatePhase, NeuronGate

N = 7


def with_random_weights(model: keras.Model, seed: int = 0) -> keras.Model:
    """Biases and moving statistics too, so that no term of the Hessian is zero by accident."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        value = rng.normal(size=variable.shape) * 0.7
        if variable.path.endswith("moving_variance"):
            value = np.exp(value)
        variable.assign(value)
    return model


def dense_net(dtype="float64", outputs=3, final="linear") -> keras.Model:
    return with_random_weights(
        keras.Sequential(
            [
                keras.Input((4,), dtype=dtype),
                layers.Dense(5, activation="tanh", dtype=dtype),
                layers.Dense(outputs, activation=final, dtype=dtype),
            ]
        )
    )


def conv_net() -> keras.Model:
    x = inputs = keras.Input((6, 6, 2), dtype="float64")
    x = layers.Conv2D(3, 3, dtype="float64")(x)
    x = layers.BatchNormalization(dtype="float64")(x)
    x = layers.Activation("gelu", dtype="float64")(x)
    x = layers.MaxPooling2D(dtype="float64")(x)
    x = layers.Flatten(dtype="float64")(x)
    return with_random_weights(keras.Model(inputs, layers.Dense(3, dtype="float64")(x)))


def data_for(model: keras.Model, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, *model.input_shape[1:]))
    return x, rng.integers(0, model.output_shape[-1], N)


def dense_gradient(model, x, y, loss, flat) -> np.ndarray:
    """Gradient of the mean loss at parameters ``flat``, by one plain tape."""
    original = [v.numpy() for v in model.trainable_variables]
    assign(model, flat)
    with tf.GradientTape() as tape:
        value, _ = SingleObjective(loss).mean(Batch(x, y), model(x, training=False))
    gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
    for variable, value in zip(model.trainable_variables, original, strict=True):
        variable.assign(value)
    return np.concatenate([tf.convert_to_tensor(g).numpy().ravel() for g in gradients])


def assign(model, flat) -> None:
    for variable in model.trainable_variables:
        size = int(np.prod(variable.shape))
        variable.assign(flat[:size].reshape(variable.shape))
        flat = flat[size:]


def dense_hessian(model, x, y, loss) -> np.ndarray:
    """Hessian of the mean loss by central differences of the gradient, O(eps^2)."""
    flat = np.concatenate([v.numpy().ravel() for v in model.trainable_variables])
    step = 1e-5
    rows = [
        dense_gradient(model, x, y, loss, flat + step * unit)
        - dense_gradient(model, x, y, loss, flat - step * unit)
        for unit in np.eye(flat.size)
    ]
    return np.array(rows) / (2 * step)


def dense_ggn(model, x, output_hessian) -> np.ndarray:
    """(1/N) sum J^T H_l J from explicit Jacobians of the logits."""
    with tf.GradientTape() as tape:
        z = model(x, training=False)
    jacobians = tape.jacobian(z, [v.value for v in model.trainable_variables])
    j = np.concatenate([part.numpy().reshape(*z.shape, -1) for part in jacobians], axis=-1)
    return sum(j[i].T @ output_hessian(z.numpy()[i]) @ j[i] for i in range(N)) / N


def as_matrix(operator: CurvatureOperator) -> np.ndarray:
    return np.array([operator.matvec(unit) for unit in np.eye(operator.dimension)])


def softmax_hessian(z):
    p = np.exp(z - z.max())
    p /= p.sum()
    return np.diag(p) - np.outer(p, p)


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("build", [dense_net, pytest.param(conv_net, marks=pytest.mark.slow)])
def test_hessian_equals_the_dense_one(build):
    model = build()
    x, y = data_for(model)
    matrix = as_matrix(CurvatureOperator(model, (x, y), CROSS_ENTROPY, batch_size=3))
    expected = dense_hessian(model, x, y, CROSS_ENTROPY)
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("build", [dense_net, conv_net])
def test_ggn_equals_the_dense_one(build):
    model = build()
    data = data_for(model)
    operator = CurvatureOperator(model, data, CROSS_ENTROPY, curvature="ggn", batch_size=3)
    expected = dense_ggn(model, data[0], softmax_hessian)
    np.testing.assert_allclose(as_matrix(operator), expected, rtol=0, atol=1e-12)


def test_ggn_is_the_same_for_logits_and_for_probabilities():
    logits, softmax = dense_net(), dense_net(final="softmax")
    data = data_for(logits)
    for loss in ("sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy()):
        one = as_matrix(CurvatureOperator(softmax, data, loss, curvature="ggn"))
        two = as_matrix(CurvatureOperator(logits, data, CROSS_ENTROPY, curvature="ggn"))
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-10)


def test_ggn_is_the_same_for_odds_and_for_sigmoid_probabilities():
    logits, sigmoid = dense_net(outputs=2), dense_net(outputs=2, final="sigmoid")
    x = data_for(logits)[0]
    y = np.random.default_rng(3).integers(0, 2, (N, 2)).astype("float64")
    loss = keras.losses.BinaryCrossentropy
    one = as_matrix(CurvatureOperator(sigmoid, (x, y), loss(), curvature="ggn"))
    two = as_matrix(CurvatureOperator(logits, (x, y), loss(from_logits=True), curvature="ggn"))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-10)


def test_ggn_equals_the_hessian_for_a_linear_model_with_squared_error():
    model = with_random_weights(
        keras.Sequential([keras.Input((4,), dtype="float64"), layers.Dense(2, dtype="float64")])
    )
    x = np.random.default_rng(0).normal(size=(N, 4))
    y = np.random.default_rng(1).normal(size=(N, 2))
    hessian = as_matrix(CurvatureOperator(model, (x, y), "mse"))
    ggn = as_matrix(CurvatureOperator(model, (x, y), "mse", curvature="ggn"))
    a = np.concatenate([x, np.ones((N, 1))], axis=1)
    # the mean over 2 outputs of squares: Hessian A (x) I * 2/2; kernel rows first, then the bias
    np.testing.assert_allclose(hessian, np.kron(a.T @ a / N, np.eye(2)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(ggn, hessian, rtol=0, atol=1e-13)


def test_recurrent_and_attention_layers_match_finite_differences():
    x = inputs = keras.Input((3, 4), dtype="float64")
    x = layers.LSTM(2, return_sequences=True, dtype="float64")(x)
    x = layers.MultiHeadAttention(1, 2, dtype="float64")(x, x)
    outputs = layers.Dense(2, dtype="float64")(layers.GlobalAveragePooling1D(dtype="float64")(x))
    model = with_random_weights(keras.Model(inputs, outputs))
    x, y = data_for(model)
    operator = CurvatureOperator(model, (x, y), CROSS_ENTROPY)
    flat, v = operator.parameters, np.random.default_rng(2).normal(size=operator.dimension)
    step = 1e-5
    ahead = dense_gradient(model, x, y, CROSS_ENTROPY, flat + step * v)
    behind = dense_gradient(model, x, y, CROSS_ENTROPY, flat - step * v)
    np.testing.assert_allclose(operator.matvec(v), (ahead - behind) / (2 * step), atol=1e-8)


def test_embedding_gradients_are_counted_densely():
    inputs = keras.Input((3,), dtype="int32")
    x = layers.Flatten(dtype="float64")(layers.Embedding(5, 2, dtype="float64")(inputs))
    model = with_random_weights(keras.Model(inputs, layers.Dense(2, dtype="float64")(x)))
    x, y = np.random.default_rng(0).integers(0, 5, (N, 3)), np.arange(N) % 2
    matrix = as_matrix(CurvatureOperator(model, (x, y), CROSS_ENTROPY))
    expected = dense_hessian(model, x, y, CROSS_ENTROPY)
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_float32_products_agree_with_float64_ones_to_float32_rounding():
    wide, narrow = dense_net(), dense_net("float32")
    x, y = data_for(wide)
    exact = as_matrix(CurvatureOperator(wide, (x, y), CROSS_ENTROPY))
    single = as_matrix(CurvatureOperator(narrow, (x.astype("float32"), y), CROSS_ENTROPY))
    assert np.linalg.norm(single - exact, 2) <= 20 * np.finfo("float32").eps * np.linalg.norm(
        exact, 2
    )


def test_batching_and_dataset_objects_do_not_change_the_result():
    model = dense_net()
    x, y = data_for(model)
    v = np.random.default_rng(0).normal(size=model.count_params())
    whole = CurvatureOperator(model, (x, y), CROSS_ENTROPY, batch_size=100)
    for other in (
        CurvatureOperator(model, (x, y), CROSS_ENTROPY, batch_size=2),
        CurvatureOperator(
            model, tf.data.Dataset.from_tensor_slices((x, y)).batch(3), CROSS_ENTROPY
        ),
    ):
        np.testing.assert_allclose(other.matvec(v), whole.matvec(v), rtol=1e-12, atol=1e-14)
        assert other.loss() == pytest.approx(whole.loss(), rel=1e-14)
        assert other.num_examples == N


def test_one_program_serves_all_batches():
    model = dense_net()
    operator = CurvatureOperator(model, data_for(model), CROSS_ENTROPY, batch_size=2)
    for seed in range(3):
        operator.matvec(np.random.default_rng(seed).normal(size=operator.dimension))
    assert operator._product.experimental_get_tracing_count() <= 2


def test_the_model_is_left_as_it_was():
    inputs = keras.Input((4,))
    x = layers.BatchNormalization()(layers.Dense(4)(inputs))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dropout(0.5)(x)))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(N, 4)).astype("float32")
    y = np.random.default_rng(1).normal(size=(N, 2)).astype("float32")
    model.train_on_batch(x, y)
    before = [v.numpy().copy() for v in [*model.variables, *model.optimizer.variables]]
    one = hessian_spectrum(model, (x, y), "mse", k=2)
    two = hessian_spectrum(model, (x, y), "mse", k=2)
    after = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
    np.testing.assert_array_equal(one.eigenvalues, two.eigenvalues)  # dropout is off
    for value, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_gates_are_constants_and_what_they_close_is_flat():
    inputs = keras.Input((4,), dtype="float64")
    gate = NeuronGate(dtype="float64")
    hidden = gate(layers.Dense(3, activation="tanh", dtype="float64")(inputs))
    model = keras.Model(inputs, layers.Dense(2, dtype="float64")(hidden))
    gate.parameters.assign([9.0, -9.0, 9.0])
    gate.phase.assign(GatePhase.PRUNING)
    data = data_for(model)
    operator = CurvatureOperator(model, data, CROSS_ENTROPY)
    assert operator.dimension == 4 * 3 + 3 + 3 * 2 + 2
    closed = np.array([i % 3 == 1 for i in range(15)] + [2 <= i < 4 for i in range(8)])
    matrix = as_matrix(operator)
    assert not np.any(matrix[closed])
    assert np.any(matrix[~closed])


def test_an_object_with_a_net_is_measured_by_its_net():
    class Holder:
        def __init__(self, net):
            self.net = net

    model = dense_net()
    v = np.ones(model.count_params())
    data = data_for(model)
    held = CurvatureOperator(Holder(model), data, CROSS_ENTROPY)
    plain = CurvatureOperator(model, data, CROSS_ENTROPY)
    np.testing.assert_array_equal(held.matvec(v), plain.matvec(v))


def test_a_subclassed_model_is_measured_once_built():
    class Custom(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x) ** 2

    model = Custom()
    x = np.ones((N, 3), "float32")
    with pytest.raises(UnsupportedModelError, match="must be built"):
        CurvatureOperator(model, (x, np.zeros((N, 2))), "mse")
    model(x)
    assert CurvatureOperator(model, (x, np.zeros((N, 2))), "mse").dimension == 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros((0, 4)), np.zeros(0)), "at least one"),
        ((np.zeros((3, 4)), np.zeros(2)), r"\[2, 3\]"),
        ((np.zeros((3, 4)),), "1 elements"),
        (np.zeros((3, 4)), "ndarray"),
    ],
    ids=["empty", "unequal", "no labels", "no pair"],
)
def test_data_that_do_not_fit_are_described(data, message):
    with pytest.raises(DataError, match=message):
        CurvatureOperator(dense_net(), data, "mse")


def test_data_that_change_between_passes_are_refused():
    counts = iter([3, 4])
    data = tf.data.Dataset.from_generator(
        lambda: ((np.ones(4), 0) for _ in range(next(counts))),
        output_signature=(tf.TensorSpec(4, tf.float64), tf.TensorSpec((), tf.int32)),
    ).batch(2)
    operator = CurvatureOperator(dense_net(), data, CROSS_ENTROPY)
    v = np.ones(operator.dimension)
    operator.matvec(v)
    with pytest.raises(DataError, match="3 examples in one pass and 4"):
        operator.matvec(v)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_examples_that_change_between_passes_are_refused(curvature):
    model, rng = dense_net(), np.random.default_rng(0)
    data = tf.data.Dataset.from_tensor_slices(data_for(model))
    noise = tf.data.Dataset.from_generator(
        lambda: (rng.normal(size=4) for _ in range(N)),
        output_signature=tf.TensorSpec(4, tf.float64),
    )
    noisy = tf.data.Dataset.zip(data, noise).map(lambda pair, n: (pair[0] + n, pair[1]))
    with pytest.raises(DataError, match=r"mean loss was .* in one pass and .* augmentation"):
        hessian_spectrum(model, noisy.batch(3), CROSS_ENTROPY, k=2, curvature=curvature)
    cached = hessian_spectrum(model, noisy.cache().batch(3), CROSS_ENTROPY, curvature=curvature)
    assert cached.converged
    operator = CurvatureOperator(
        model, data.shuffle(N).batch(3), CROSS_ENTROPY, curvature=curvature
    )
    v = np.ones(operator.dimension)
    for scale in (1.0, 1.0, 2.0):  # another order, and other weights, are no other data
        model.trainable_variables[0].assign(scale * model.trainable_variables[0])
        operator.matvec(v)


def _tokens(mask_zero=True):
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=mask_zero, dtype="float64")(tokens)
    net = keras.Model(tokens, layers.Dense(3, dtype="float64")(x))
    return with_random_weights(net)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("left_out", ["mask", "class"])
def test_the_batch_size_does_not_matter_where_entries_do_not_count(left_out, curvature):
    """The matrix is that of Keras' own loss over all the data at once."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 7, (N, 5)), rng.integers(0, 3, (N, 5))
    missing = np.arange(5) >= rng.integers(1, 6, (N, 1))
    if left_out == "mask":
        x[missing] = 0
    else:
        y[missing] = -1
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model = _tokens(mask_zero=left_out == "mask")
    operators = [
        CurvatureOperator(model, (x, y), loss, curvature=curvature, batch_size=size)
        for size in (1, 2, N)
    ]
    whole = as_matrix(operators[-1])
    for operator in operators[:-1]:
        # Older versions of Keras count what a mask leaves in float32.
        atol = 1e-8 if IS_OLD else 1e-12
        np.testing.assert_allclose(as_matrix(operator), whole, rtol=0, atol=atol)
    value = loss(tf.constant(y), model(x, training=False))  # to which the mask belongs
    assert operators[0].loss() == pytest.approx(float(value), rel=1e-6)
    if curvature == "hessian":
        np.testing.assert_allclose(whole, dense_hessian(model, x, y, loss), rtol=0, atol=1e-8)


def test_an_attribute_named_net_is_a_part_of_the_users_model():
    class Outer(keras.Model):
        def __init__(self):
            super().__init__(dtype="float64")
            self.net, self.head = dense_net(), layers.Dense(3, dtype="float64")

        def call(self, x):
            return self.head(self.net(x))

    model, x = Outer(), np.zeros((N, 4))
    model(x)
    operator = CurvatureOperator(model, (x, np.zeros(N, int)), CROSS_ENTROPY)
    assert operator.dimension == model.count_params() == dense_net().count_params() + 12


def test_what_a_recurrent_layer_keeps_is_put_back():
    inputs = keras.Input(batch_shape=(2, 3, 2), dtype="float64")
    lstm = layers.LSTM(3, stateful=True, dtype="float64")
    model = with_random_weights(keras.Model(inputs, layers.Dense(2, dtype="float64")(lstm(inputs))))
    before = [0.1 * np.random.default_rng(0).normal(size=s.shape) for s in lstm.states]
    for state, value in zip(lstm.states, before, strict=True):
        state.assign(value)
    x = np.random.default_rng(1).normal(size=(6, 3, 2))
    found = hessian_spectrum(model, (x, np.zeros(6, int)), CROSS_ENTROPY, batch_size=2)
    assert found.converged
    CurvatureOperator(model, (x, np.zeros(6, int)), CROSS_ENTROPY, batch_size=2).loss()
    for state, value in zip(lstm.states, before, strict=True):
        np.testing.assert_array_equal(state, value)


class OwnCall(layers.Layer):
    """A layer of the user's own, of which nobody knows what it computes."""

    def __init__(self, function, **kwargs):
        super().__init__(dtype="float64", **kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


OWN_CALLS = {
    "resize": (lambda x: keras.ops.image.resize(x, (5, 5)), "ResizeBilinear"),
    "moments": (lambda x: x - keras.ops.moments(x, [1, 2], keepdims=True)[1], "StopGradient"),
    "transform": (
        lambda x: keras.ops.image.affine_transform(
            x, np.array([1.1, 0.1, 0, 0, 0.9, 0, 0, 0], "float32")
        ),
        "ImageProjectiveTransform",
    ),
}


@pytest.mark.parametrize("case", OWN_CALLS)
def test_operations_inside_of_own_layers_are_refused_by_their_place(case):
    function, operation = OWN_CALLS[case]
    inputs = keras.Input((4, 4, 2), dtype="float64")
    x = layers.Conv2D(2, 2, dtype="float64")(inputs)
    x = layers.Flatten(dtype="float64")(OwnCall(function, name="mine")(x))
    model = with_random_weights(keras.Model(inputs, layers.Dense(2, dtype="float64")(x)))
    data = (np.random.default_rng(0).normal(size=(3, 4, 4, 2)), np.zeros(3, int))
    with pytest.raises(UnsupportedModelError, match=f"/mine.*{operation}"):
        hessian_spectrum(model, data, CROSS_ENTROPY)
    if case == "moments":  # wrong at second order only
        assert hessian_spectrum(model, data, CROSS_ENTROPY, curvature="ggn").converged


@pytest.mark.parametrize("case", OWN_CALLS)
def test_what_own_layers_do_to_inputs_alone_is_no_matter(case):
    inputs = keras.Input((4, 4, 2), dtype="float64")
    x = layers.Flatten(dtype="float64")(OwnCall(OWN_CALLS[case][0])(inputs))
    model = with_random_weights(keras.Model(inputs, layers.Dense(2, dtype="float64")(x)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, 4, 4, 2)), rng.integers(0, 2, N)
    found = as_matrix(CurvatureOperator(model, (x, y), CROSS_ENTROPY))
    np.testing.assert_allclose(found, dense_hessian(model, x, y, CROSS_ENTROPY), atol=1e-6)


def test_an_image_that_center_crop_enlarges_is_right():
    inputs = keras.Input((3, 3, 1), dtype="float64")
    x = layers.Conv2D(2, 2, activation="tanh", dtype="float64")(inputs)
    x = layers.Flatten(dtype="float64")(layers.CenterCrop(3, 3, dtype="float64")(x))
    model = with_random_weights(keras.Model(inputs, layers.Dense(2, dtype="float64")(x)))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, 3, 3, 1)), rng.integers(0, 2, N)
    found = as_matrix(CurvatureOperator(model, (x, y), CROSS_ENTROPY))
    # Images are resized in float32.
    np.testing.assert_allclose(found, dense_hessian(model, x, y, CROSS_ENTROPY), atol=2e-2)


def test_a_small_largest_eigenvalue_beside_a_large_negative_one_is_found():
    """Outputs enter the loss concavely by far, and the bias convexly by little."""
    inputs = keras.Input((12,), dtype="float64")
    model = with_random_weights(keras.Model(inputs, layers.Dense(4, dtype="float64")(inputs)))

    def loss(y, z):
        return keras.ops.sum(y[:, None] * z**2, axis=-1)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 12))
    y = np.where(np.arange(40) < 30, -100.0, 0.1 * rng.uniform(size=40))
    x[:30, 6:] = 0
    found = hessian_spectrum(model, (x, y), loss, tolerance=1e-4)
    exact = np.linalg.eigvalsh(as_matrix(CurvatureOperator(model, (x, y), loss)))
    assert exact[0] < -100 * exact[-1]
    assert found.converged
    assert found.top == pytest.approx(exact[-1], rel=1e-3)


def test_data_without_an_end_and_batches_that_do_not_fit_are_refused():
    model = dense_net()
    x, y = data_for(model)
    endless = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(2)
    with pytest.raises(DataError, match=r"no end.*repeat"):
        hessian_spectrum(model, endless, CROSS_ENTROPY)
    unequal = tf.data.Dataset.from_tensors((x, y[:1]))
    with pytest.raises(DataError, match=r"\[1, 7\]"):
        hessian_spectrum(model, unequal, CROSS_ENTROPY)
    lists = CurvatureOperator(model, (x.tolist(), list(y)), CROSS_ENTROPY)
    assert lists.loss() == CurvatureOperator(model, (x, y), CROSS_ENTROPY).loss()


def test_several_outputs_frozen_models_and_mixed_types_are_told_apart():
    inputs = keras.Input((4,), dtype="float64")
    hidden = layers.Dense(3, dtype="float64")(inputs)
    data = (np.zeros((2, 4)), np.zeros(2, int))
    with pytest.raises(UnsupportedModelError, match=r"one tensor.*dict"):
        hessian_spectrum(keras.Model(inputs, {"a": hidden}), data, CROSS_ENTROPY)
    mixed = keras.Model(inputs, layers.Dense(2, dtype="float32")(hidden))
    with pytest.raises(UnsupportedModelError, match="'float32', 'float64'"):
        hessian_spectrum(mixed, data, CROSS_ENTROPY)
    frozen = dense_net()
    frozen.trainable = False
    with pytest.raises(UnsupportedModelError, match="frozen"):
        hessian_spectrum(frozen, data, CROSS_ENTROPY)


@pytest.mark.parametrize(
    "arguments", [{"curvature": "fisher"}, {"scaling": "l2"}, {"batch_size": 0}, {"loss": "nope"}]
)
def test_unknown_options_are_named(arguments):
    model = dense_net()
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        CurvatureOperator(model, data_for(model), **{"loss": "mse", **arguments})


def test_reduced_precision_is_refused_by_the_layers_name():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, dtype="mixed_bfloat16", name="half")(inputs))
    with pytest.raises(UnsupportedModelError, match=r"'half'.*bfloat16"):
        CurvatureOperator(model, (np.zeros((2, 4)), np.zeros((2, 2))), "mse")


def test_several_outputs_are_refused():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(2)(inputs)])
    with pytest.raises(UnsupportedModelError, match="2 outputs"):
        CurvatureOperator(model, (np.zeros((2, 4)), np.zeros((2, 2))), "mse")
