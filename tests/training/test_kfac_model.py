"""K-FAC on ordinary models: every kind of layer, every feature of Keras optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.curvature import Batch
from tf_kfacprune.errors import (
    DataError,
    InvalidArgumentError,
    NonFiniteError,
    UnsupportedModelError,
)

L = keras.layers
to_numpy = keras.ops.convert_to_numpy
BATCH = 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X[:, :3].sum(axis=1) > 0).astype("int32") + (X[:, 3] > 1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _network(**last):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = L.Dense(8, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, L.Dense(3, name="logits", **last)(x))


def _fit(network, optimizer, *, x=X, y=Y, loss=LOSS, epochs=1, eager=True, **compiled):
    """Eager, as tracing a step takes longer than taking some."""
    model = kp.KFACModel(network, seed=0)
    model.compile(optimizer, loss, run_eagerly=eager, **compiled)
    history = model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history


def _weights(model):
    return [to_numpy(v) for v in model.net.trainable_variables]


FIXED = {"learning_rate": 0.05, "factor_every": 1, "inverse_every": 2, "batch_fraction": 1.0}
AUTO = {**FIXED, "learning_rate": "auto"}


def test_other_optimizers_take_the_steps_of_plain_keras():
    plain = _network()
    plain.compile(keras.optimizers.Adam(0.01), LOSS)
    plain.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    model, _ = _fit(_network(), keras.optimizers.Adam(0.01), epochs=2, eager=False)
    for ours, theirs in zip(_weights(model), plain.trainable_variables, strict=True):
        np.testing.assert_array_equal(ours, to_numpy(theirs))


def test_the_wrapped_model_is_the_one_that_is_trained():
    network = _network()
    before = [to_numpy(v) for v in network.trainable_variables]
    model, _ = _fit(network, kp.KFAC(**FIXED), eager=False)
    assert model.net is network
    for old, new in zip(before, network.trainable_variables, strict=True):
        assert not np.array_equal(old, to_numpy(new))


def _autoencoder_of_every_layer():
    inputs = keras.Input((8, 8, 2))
    x = L.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = L.BatchNormalization()(x)
    x = L.DepthwiseConv2D(3, padding="same")(x)
    x = L.Conv2D(4, 3, padding="same", groups=2)(x)
    x = L.SeparableConv2D(4, 3, strides=2, padding="same")(x)
    x = L.LayerNormalization()(x)
    x = L.Conv2DTranspose(3, 3, strides=2, padding="same")(x)
    return keras.Model(inputs, L.Dense(2)(x))


def _text_model():
    inputs = keras.Input((5,), dtype="int32")
    x = L.Embedding(11, 6)(inputs)
    x = x + L.MultiHeadAttention(2, 3)(x, x)
    x = L.RMSNormalization()(x)
    x = L.EinsumDense("abc,cd->abd", (5, 4), bias_axes="d", activation="relu")(x)
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling1D()(x)))


class _Subclassed(keras.Model):
    """A model without a graph, with a layer of the user's own in it."""

    def __init__(self):
        super().__init__()
        self.first = L.Dense(5, activation="relu")
        self.own = _Own()

    def call(self, inputs, training=None):
        return self.own(self.first(inputs))


class _Own(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = L.Dense(3)
        self.scale = self.add_weight((), "ones", name="scale")

    def call(self, inputs):
        return self.scale * self.inner(inputs)


def _assert_step_is_that_of_its_factors(network, x, y, loss, **settings):
    """One step equals `(A + pi d I)^-1 dW (G + d/pi I)^-1` in float64, in every block."""
    model = kp.KFACModel(network, seed=0)
    optimizer = kp.KFAC(**{**FIXED, "kl_clip": None, "damping": 0.1, **settings})
    model.compile(optimizer, loss, run_eagerly=True)
    with tf.GradientTape() as tape:
        value = model.compute_loss(y=y, y_pred=network(x, training=True))
    gradients = [to_numpy(g) for g in tape.gradient(value, network.trainable_variables)]
    before = [to_numpy(v) for v in network.trainable_variables]
    model.train_on_batch(x, y)
    places = {id(v): k for k, v in enumerate(network.trainable_variables)}
    weight = float(optimizer._curvature._average_weight)
    for state in optimizer._curvature.states:
        block = state.block
        members = [places[id(v)] for v in block.variables]
        gradient = to_numpy(block.to_matrix([gradients[k] for k in members])).astype("float64")
        moved = [before[k] - to_numpy(v) for k, v in zip(members, block.variables, strict=True)]
        factors = [to_numpy(f.averages[0]).astype("float64") / weight for f in (state.a, state.g)]
        factors = [_whole(f, block) for f in factors]
        means = [np.trace(f, axis1=-2, axis2=-1) / f.shape[-1] for f in factors]
        pi = np.sqrt(means[0] / means[1])[..., None, None]
        a, g = (
            np.linalg.inv(f + shift * np.sqrt(0.1) * np.eye(f.shape[-1]))
            for f, shift in zip(factors, (pi, 1.0 / pi), strict=True)
        )
        expected = 0.05 * a @ gradient @ g
        got = to_numpy(block.to_matrix(moved))
        scale = np.abs(expected).max()
        assert scale > 1e-6, block.name
        atol = 2e-3 * scale + 2e-8  # a step is the difference of two weights in float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=block.name)
    return model


def _whole(factor, block):
    """A factor as a matrix, where it is kept as a vector."""
    is_vector = factor.ndim == 1 + len(block.group_shape)
    return factor[..., None] * np.eye(factor.shape[-1]) if is_vector else factor


def test_convolutions_and_normalizations_of_every_kind_take_the_steps_of_their_factors():
    keras.utils.set_random_seed(0)
    network = _autoencoder_of_every_layer()
    x = np.random.default_rng(1).normal(size=(32, 8, 8, 2)).astype("float32")
    model = _assert_step_is_that_of_its_factors(network, x, x, "mse")
    assert not model.without_block
    assert len(model.blocks) == 9
    # The last layer sees every pixel of every image: G is that of a mean over pixels and channels.
    last = model.optimizer._curvature.states[-1]
    weight = float(model.optimizer._curvature._average_weight)
    found = to_numpy(last.g.averages[0]) / weight
    np.testing.assert_allclose(found, np.eye(2) / 64, atol=0.2 / 64)  # drawn at 2048 pixels


def test_factors_on_a_part_of_the_locations_are_those_of_all_where_these_are_equal():
    keras.utils.set_random_seed(0)
    x = np.ones((16, 8, 8, 2), "float32") * RNG.normal(size=(16, 1, 1, 2)).astype("float32")
    averages = []
    for fraction in (0.25, 1.0):
        inputs = keras.Input((8, 8, 2))
        network = keras.Model(inputs, L.Conv2D(4, 3, kernel_initializer="ones")(inputs))
        optimizer = kp.KFAC(**FIXED, labels="data", location_fraction=fraction)
        _fit(network, optimizer, x=x, y=np.zeros((16, 6, 6, 4)), loss="mse", epochs=1)
        averages.append([to_numpy(v) for v in optimizer._curvature.states[0].averages])
    for part, whole in zip(*averages, strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_text_models_take_the_steps_of_their_factors():
    keras.utils.set_random_seed(0)
    tokens = np.random.default_rng(1).integers(0, 11, size=(64, 5))
    labels = (tokens == 3).any(axis=1).astype("int32")
    model = _assert_step_is_that_of_its_factors(_text_model(), tokens, labels, LOSS)
    assert not model.without_block


def test_the_quadratic_model_of_a_text_model_is_that_of_its_gauss_newton_matrix():
    """Derivatives of the outputs along a direction are taken by differences."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(1)
    tokens, labels = rng.integers(0, 11, size=(64, 5)), rng.integers(0, 3, size=64)
    network = _text_model()
    model = kp.KFACModel(network, seed=0)
    model.compile("sgd", LOSS)
    variables = network.trainable_variables
    start = [to_numpy(v) for v in variables]
    direction = [rng.normal(size=v.shape).astype("float32") for v in variables]
    ((found,),) = to_numpy(
        model.trainee.estimator.quadratic_form(
            Batch(tokens, labels), variables, [direction], is_whole=True
        )
    )
    outputs = []
    for step in (3e-5, -3e-5):
        for variable, value, way in zip(variables, start, direction, strict=True):
            variable.assign(value + step * way)
        outputs.append(to_numpy(network(tokens)).astype("float64"))
    along = (outputs[0] - outputs[1]) / 6e-5
    p = np.exp(np.mean(outputs, axis=0))
    p /= p.sum(axis=1, keepdims=True)
    expected = np.mean((p * along**2).sum(axis=1) - (p * along).sum(axis=1) ** 2)
    assert found == pytest.approx(expected, rel=5e-3)


def test_subclassed_models_and_layers_of_the_users_own_are_searched():
    keras.utils.set_random_seed(0)
    network = _Subclassed()
    network(X[:1])
    model = _assert_step_is_that_of_its_factors(network, X, Y, LOSS)
    assert [block.layer.name for block in model.blocks] == [
        network.first.name,
        network.own.inner.name,
    ]
    # Adam's first step is its rate, whatever the gradient.
    assert abs(float(network.own.scale) - 1.0) == pytest.approx(0.1 * 0.05, rel=1e-3)
    lines = []
    model.optimizer.summary(lines.append)
    assert any("scale" in line and "_Own" in line for line in lines)


def test_shared_layers_sum_their_factors_over_uses():
    """A is the sum over uses, G the mean, of the exact Fisher, reckoned in float64."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    shared = L.Dense(6, activation="tanh", name="shared")
    last = L.Dense(3, name="last")
    network = keras.Model(inputs, last(shared(shared(inputs))))
    w, b = (to_numpy(v).astype("float64") for v in shared.weights)
    v, c = (to_numpy(v).astype("float64") for v in last.weights)
    model = kp.KFACModel(network, seed=0)
    model.compile(kp.KFAC(**FIXED, labels="exact"), LOSS)
    model.train_on_batch(X, Y)
    first = np.tanh(X @ w + b)
    second = np.tanh(first @ w + b)
    p = np.exp(second @ v + c)
    p /= p.sum(axis=1, keepdims=True)
    fisher = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]

    def back(matrix, weights, activated):
        jacobian = weights.T[None] * (1 - activated**2)[:, None, :]
        return np.einsum("bji,bjk,bkl->bil", jacobian, matrix, jacobian)

    g_second = back(fisher, v, second)
    g_first = back(g_second, w, first)
    rows = [np.c_[a, np.ones(64)] for a in (X.astype("float64"), first)]
    expected = {
        "shared": (
            sum(a.T @ a for a in rows) / 64,
            0.5 * (g_first.mean(axis=0) + g_second.mean(axis=0)),
        ),
        "last": (np.c_[second, np.ones(64)].T @ np.c_[second, np.ones(64)] / 64, fisher.mean(0)),
    }
    curvature = model.optimizer._curvature
    assert len(curvature.states) == 2
    weight = float(curvature._average_weight)
    for state in curvature.states:
        for factor, wanted in zip((state.a, state.g), expected[state.name], strict=True):
            found = to_numpy(factor.averages[0]) / weight
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=state.name)


def test_a_loss_scale_changes_nothing_but_rounding():
    plain, _ = _fit(_network(), kp.KFAC(**FIXED))
    scaled, _ = _fit(_network(), kp.KFAC(**FIXED, loss_scale_factor=1024.0))
    for ours, theirs in zip(_weights(plain), _weights(scaled), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


SCALE_FREE = {**AUTO, "damping": kp.LevenbergMarquardt(every=2)}


def test_a_weight_on_the_loss_changes_no_adaptive_step():
    plain, _ = _fit(_network(), kp.KFAC(**SCALE_FREE))
    scaled, _ = _fit(_network(), kp.KFAC(**SCALE_FREE), loss_weights=[100.0])
    damping = [float(model.optimizer.current_damping) for model in (plain, scaled)]
    assert damping[1] == pytest.approx(100 * damping[0], rel=0.01)
    for ours, theirs in zip(_weights(plain), _weights(scaled), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("policy", "digits"), [("mixed_float16", 1e-3), ("mixed_bfloat16", 8e-3)])
def test_half_precision_takes_the_steps_of_single_precision(policy, digits):
    found = []
    for dtype in (policy, "float32"):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((6,))
        x = L.Dense(8, activation="tanh", dtype=dtype)(inputs)
        network = keras.Model(inputs, L.Dense(3, dtype="float32")(x))
        optimizer = kp.KFAC(**FIXED, labels="exact", damping=0.1)
        scaled = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        start = [to_numpy(v) for v in network.trainable_variables]
        model, _ = _fit(network, scaled if dtype == policy else optimizer)
        found.append([w - s for w, s in zip(_weights(model), start, strict=True)])
    for half, single in zip(*found, strict=True):
        np.testing.assert_allclose(half, single, rtol=0, atol=20 * digits * np.abs(single).max())


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        (AUTO, {"jit_compile": False, "steps_per_execution": 2}),
        pytest.param({**FIXED, "inverse": "ekfac"}, {"jit_compile": True}, marks=pytest.mark.slow),
        pytest.param(AUTO, {"jit_compile": True}, marks=pytest.mark.slow),
    ],
    ids=["auto", "ekfac by XLA", "auto by XLA"],
)
def test_compiled_steps_equal_eager_ones(settings, arguments):
    """Eager ones are compared with a reference in float64 in test_kfac_steps.py."""
    found = []
    for compiled in ({"eager": False, **arguments}, {}):
        # The empirical Fisher: XLA draws other labels.
        optimizer = kp.KFAC(**settings, labels="data")
        model, _ = _fit(_network(), optimizer, epochs=2, **compiled)
        found.append(_weights(model))
    for ours, eager in zip(*found, strict=True):
        np.testing.assert_allclose(ours, eager, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [FIXED, AUTO, {**FIXED, "inverse": "ekfac"}],
    ids=["fixed", "auto", "ekfac"],
)
def test_training_resumed_from_a_file_is_bit_equal(settings, tmp_path):
    whole = kp.KFACModel(_network(), seed=0)
    whole.compile(kp.KFAC(**settings), LOSS, run_eagerly=True)
    saving = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    whole.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[saving])
    resumed = keras.saving.load_model(tmp_path / "1.keras")
    resumed.fit(X, Y, batch_size=BATCH, epochs=2, initial_epoch=1, shuffle=False, verbose=0)
    for ours, theirs in zip(_weights(whole), _weights(resumed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_damping_falls_while_steps_keep_their_promise_on_new_examples():
    """Targets without noise: what helps on one batch helps on the next."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    network = keras.Model(inputs, L.Dense(2)(inputs))
    target = X[:, :2] @ np.array([[1.0, 2.0], [0.5, -1.0]], "float32")
    optimizer = kp.KFAC(**{**AUTO, "damping": kp.LevenbergMarquardt(1.0, every=1)})
    model, history = _fit(network, optimizer, y=target, loss="mse", epochs=4)
    assert history["damping"][-1] < 0.8
    assert history["learning_rate"][-1] == pytest.approx(float(model.optimizer.learning_rate))


def test_one_adaptive_step_minimizes_the_exact_quadratic_model():
    """For a linear model with squared loss the quadratic model is the loss: the step is optimal."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    network = keras.Model(inputs, L.Dense(2)(inputs))
    x = X[:BATCH]
    target = x[:, :2] @ np.array([[1.0, 2.0], [0.5, -1.0]], "float32") + 1.0
    model = kp.KFACModel(network, seed=0)
    settings = {**AUTO, "damping": 1e-6, "labels": "exact"}
    model.compile(kp.KFAC(**settings), "mse", run_eagerly=True)
    model.train_on_batch(x, target)
    # A (x) G is the exact Gauss-Newton matrix here, so one step is a Newton step.
    np.testing.assert_allclose(model.predict_on_batch(x), target, atol=1e-2)


def test_a_batch_with_nan_changes_nothing():
    model = kp.KFACModel(_network(), max_skipped_steps=2)
    model.compile(kp.KFAC(**AUTO), LOSS, run_eagerly=True)
    before = _weights(model) + [to_numpy(v) for v in model.optimizer.variables]
    with pytest.raises(NonFiniteError):
        model.fit(np.full_like(X, np.nan), Y, batch_size=BATCH, verbose=0)
    after = _weights(model) + [to_numpy(v) for v in model.optimizer.variables]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_memory_is_told_before_training():
    model = kp.KFACModel(_network())
    optimizer = kp.KFAC(max_factor_dim=8)
    model.compile(optimizer, LOSS)
    lines = []
    optimizer.summary(lines.append)
    text = "\n".join(lines)
    assert "A 7x7, G 8x8" in text
    assert "A diag 9" in text
    assert "above max_factor_dim: A" in text
    held = sum(np.prod(v.shape) for v in optimizer.variables if "logits" in v.path) * 4
    assert f"{(9 + 9 + 3 * 3 * 2) * 4 / 2**20:,.2f} MiB" in text
    assert held


def test_a_layer_that_is_never_called_is_named():
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.idle = L.Dense(3), L.Dense(3, name="idle")

        def build(self, shape):
            self.used.build(shape)
            self.idle.build(shape)
            self.built = True

        def call(self, inputs):
            return self.used(inputs)

    network = Idle()
    network.build((None, 6))
    model = kp.KFACModel(network)
    model.compile(kp.KFAC(**FIXED), LOSS)
    with pytest.raises(UnsupportedModelError, match="idle"):
        model.fit(X, Y, batch_size=BATCH, verbose=0)


def test_models_that_are_not_built_are_refused():
    with pytest.raises(UnsupportedModelError, match="not built"):
        kp.KFACModel(keras.Sequential([L.Dense(3)]))


@pytest.mark.parametrize("settings", [FIXED, AUTO], ids=["fixed", "auto"])
def test_two_losses_are_trained_as_one_that_is_their_sum(settings):
    """Of a linear layer cut in two: a mean over 4 outputs, and two of 2, half as heavy."""
    found = []
    for parts in (1, 2):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        whole = L.Dense(4)(inputs)
        outputs = [whole[:, :2], whole[:, 2:]] if parts == 2 else whole
        y = [X[:, :2], X[:, 2:4]] if parts == 2 else X[:, :4]
        model = kp.KFACModel(keras.Model(inputs, outputs), seed=0)
        optimizer = kp.KFAC(**settings, labels="exact", damping=0.1)
        weights = [0.5, 0.5] if parts == 2 else None
        losses = ["mse", "mse"] if parts == 2 else "mse"
        model.compile(optimizer, losses, loss_weights=weights, run_eagerly=True)
        for k in range(0, 64, BATCH):
            of_batch = [t[k : k + BATCH] for t in y] if parts == 2 else y[k : k + BATCH]
            model.train_on_batch(X[k : k + BATCH], of_batch)
        found.append(_weights(model))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)


def test_the_quadratic_model_needs_a_model_that_provides_it():
    network = _network()
    optimizer = kp.KFAC("auto")
    optimizer.bind(kp.KFACModel(network).blocks)
    optimizer.build(network.trainable_variables)
    gradients = [tf.ones(v.shape) for v in network.trainable_variables]
    with pytest.raises(InvalidArgumentError, match="KFACModel"):
        optimizer.apply(gradients, network.trainable_variables)


def test_pruning_works_with_the_adaptive_mode():
    keras.utils.set_random_seed(0)
    pm = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.5), seed=0)
    pm.compile(kp.KFAC(**AUTO), LOSS, run_eagerly=True)
    pm.fit(X, Y, batch_size=BATCH, epochs=4, verbose=0)
    small = kp.compact(pm)
    assert small.get_layer("hidden").units <= 4


def test_layers_may_be_frozen_and_freed_between_two_compilations():
    network = _network()
    model = kp.KFACModel(network, seed=0)
    network.get_layer("hidden").trainable = False
    model.compile(kp.KFAC(**FIXED), LOSS)
    assert [block.layer.name for block in model.optimizer.blocks] == ["logits"]
    network.get_layer("hidden").trainable = True
    model.compile(kp.KFAC(**FIXED), LOSS)
    assert [block.layer.name for block in model.optimizer.blocks] == ["hidden", "logits"]
    network.get_layer("hidden").trainable = False
    with pytest.raises(InvalidArgumentError, match="frozen or freed"):
        model.compile(model.optimizer, LOSS)


def test_arrays_without_labels_are_refused_unless_nothing_asks_for_labels():
    model = kp.KFACModel(_network(), seed=0)
    model.compile(keras.optimizers.SGD(0.1), LOSS, run_eagerly=True)
    for x in (X, [X]):
        with pytest.raises(DataError, match=r"y=None.*fit\(x, x\)"):
            model.fit(x, verbose=0)
    model.fit(tf.data.Dataset.from_tensors((X, Y)), shuffle=False, verbose=0)
    own = keras.Sequential(
        [keras.Input((6,)), L.Dense(2, name="own", activity_regularizer=keras.regularizers.L2(1.0))]
    )
    before = np.array(own.get_layer("own").kernel)
    model = kp.KFACModel(own, seed=0)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    model.fit(X, verbose=0)
    assert not np.array_equal(own.get_layer("own").kernel, before)


@pytest.mark.parametrize("settings", [FIXED, AUTO], ids=["fixed", "auto"])
def test_labels_that_the_loss_ignores_count_in_nothing(settings):
    """The steps are those of the same batches without these examples."""
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    ignored = np.arange(64) % 4 == 0
    settings = {**settings, "labels": "exact", "damping": 0.1}
    model, _ = _fit(_network(), kp.KFAC(**settings), y=np.where(ignored, 255, Y), loss=ignoring)
    expected = kp.KFACModel(_network(), seed=0)
    expected.compile(kp.KFAC(**settings), LOSS, run_eagerly=True)
    rest = tf.data.Dataset.from_tensor_slices((X[~ignored], Y[~ignored])).batch(12)
    expected.fit(rest, shuffle=False, verbose=0)
    for ours, wanted in zip(_weights(model), _weights(expected), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-3, atol=2e-4)


class UnusedHead(keras.Model):
    """A layer that is called but has no part in the output."""

    def __init__(self):
        super().__init__()
        self.head, self.unused = L.Dense(3), L.Dense(2)

    def call(self, x):
        self.unused(x)
        return self.head(x)


@pytest.mark.parametrize(
    "settings",
    [FIXED, {**AUTO, "damping": kp.LevenbergMarquardt(0.1)}],
    ids=["fixed", "adaptive"],
)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_layer_without_a_gradient_stays_as_it_is(settings):
    keras.utils.set_random_seed(0)
    network = UnusedHead()
    network(X[:1])
    before, head = to_numpy(network.unused.kernel), to_numpy(network.head.kernel)
    _fit(network, kp.KFAC(**settings), epochs=1)
    np.testing.assert_array_equal(network.unused.kernel, before)
    assert np.abs(network.head.kernel - head).max() > 0.01


@pytest.mark.parametrize("settings", [FIXED, AUTO], ids=["fixed", "auto"])
def test_a_network_in_double_precision_takes_the_same_steps(settings):
    found = []
    for dtype in ("float64", "float32"):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,), dtype=dtype)
        hidden = L.Dense(8, activation="tanh", dtype=dtype, name="hidden")(inputs)
        network = keras.Model(inputs, L.Dense(3, dtype=dtype, name="logits")(hidden))
        for weight, value in zip(network.weights, _network().weights, strict=True):
            weight.assign(to_numpy(value))
        optimizer = kp.KFAC(**{**settings, "labels": "exact", "damping": 0.1})
        model, _ = _fit(network, optimizer, x=X.astype(dtype))
        found.append(_weights(model))
    for double, single in zip(*found, strict=True):
        assert double.dtype == "float64"
        np.testing.assert_allclose(double, single, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_bad_batches_end_the_training_before_the_epoch_does(steps):
    model = kp.KFACModel(_network(), max_skipped_steps=8)
    model.compile("sgd", LOSS, steps_per_execution=steps)
    seen = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda n, logs: seen.append(n))
    with pytest.raises(NonFiniteError):
        model.fit(
            np.full((480, 6), np.nan), np.zeros(480), batch_size=8, callbacks=[count], verbose=0
        )
    assert seen[-1] < 20


def test_moments_in_a_new_eigenbasis_all_count_the_same():
    optimizer = kp.KFAC(factor_every=1, inverse_every=4, inverse="ekfac")
    model = kp.KFACModel(keras.Sequential([keras.Input((6,)), L.Dense(3)]), seed=0)
    model.compile(optimizer, "mse")
    (state,) = optimizer._curvature.states
    moments = state.moments
    factors = [tf.eye(7), tf.eye(3)]
    for step, value in ((8, 100.0), (9, 5.0), (10, 6.0)):
        optimizer.iterations.assign(step)
        optimizer.update_factors([*factors, tf.fill((7, 3), value)])
    # The eigenvalues of the identity, and the two moments since.
    np.testing.assert_allclose(to_numpy(moments), np.full((7, 3), 4.0), rtol=1e-5)
    with pytest.raises(InvalidArgumentError, match="inverse_every"):
        kp.KFAC(factor_every=4, inverse_every=4, inverse="ekfac")
