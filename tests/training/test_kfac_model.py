"""K-FAC on ordinary models: every kind of layer, every feature of Keras optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError, NonFiniteError, UnsupportedModelError

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


def _fit(network, optimizer, *, x=X, y=Y, loss=LOSS, epochs=2, **compile_arguments):
    model = kp.KFACModel(network, seed=0)
    model.compile(optimizer, loss, **compile_arguments)
    history = model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history


def _weights(model):
    return [to_numpy(v) for v in model.net.trainable_variables]


FIXED = {"learning_rate": 0.05, "factor_every": 1, "inverse_every": 2, "batch_fraction": 1.0}
AUTO = {**FIXED, "learning_rate": "auto"}


@pytest.mark.parametrize(
    "settings",
    [
        FIXED,
        {**FIXED, "inverse": "eigen"},
        {**FIXED, "inverse": "ekfac"},
        {**FIXED, "labels": "data"},
        {**FIXED, "labels": "exact"},
        {**FIXED, "weight_sharing": "reduce"},
        {**FIXED, "max_factor_dim": 6},
        {**FIXED, "max_factor_dim": 6, "inverse": "ekfac"},
        {**FIXED, "max_factor_dim": 6, "large_factors": "split", "inverse": "ekfac"},
        {**FIXED, "norm_constraint": 0.05},
        {**FIXED, "damping": kp.LevenbergMarquardt(0.1, every=2)},
        AUTO,
        {**AUTO, "momentum": 0.0, "labels": "exact"},
        {**AUTO, "damping": 0.05, "inverse": "ekfac"},
    ],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items() if FIXED.get(k) != v) or "fixed",
)
def test_the_loss_falls(settings):
    _, history = _fit(_network(), kp.KFAC(**settings), epochs=6)
    assert history["loss"][-1] < 0.8 * history["loss"][0]


def test_other_optimizers_take_the_steps_of_plain_keras():
    plain = _network()
    plain.compile(keras.optimizers.Adam(0.01), LOSS)
    plain.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    model, _ = _fit(_network(), keras.optimizers.Adam(0.01))
    for ours, theirs in zip(_weights(model), plain.trainable_variables, strict=True):
        np.testing.assert_allclose(ours, to_numpy(theirs), rtol=1e-6, atol=1e-7)


def test_the_wrapped_model_is_the_one_that_is_trained():
    network = _network()
    before = [to_numpy(v) for v in network.trainable_variables]
    model, _ = _fit(network, kp.KFAC(**FIXED))
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


@pytest.mark.parametrize("learning_rate", [0.05, "auto"])
def test_convolutions_and_normalizations_of_every_kind_learn(learning_rate):
    keras.utils.set_random_seed(0)
    network = _autoencoder_of_every_layer()
    x = np.random.default_rng(1).normal(size=(32, 8, 8, 2)).astype("float32")
    settings = {**FIXED, "learning_rate": learning_rate, "damping": 0.1}
    model, history = _fit(network, kp.KFAC(**settings), x=x, y=x, loss="mse", epochs=4)
    assert not model.without_block
    assert len(model.blocks) == 9
    assert history["loss"][-1] < history["loss"][0]


def test_factors_on_a_part_of_the_locations_do():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(1).normal(size=(32, 8, 8, 2)).astype("float32")
    inputs = keras.Input((8, 8, 2))
    network = keras.Model(inputs, L.Dense(2)(L.Conv2D(4, 3, padding="same")(inputs)))
    optimizer = kp.KFAC(**FIXED, location_fraction=0.25)
    _, history = _fit(network, optimizer, x=x, y=x, loss="mse", epochs=3)
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("learning_rate", [0.05, "auto"])
def test_text_models_learn(learning_rate):
    keras.utils.set_random_seed(0)
    tokens = np.random.default_rng(1).integers(0, 11, size=(64, 5))
    labels = (tokens == 3).any(axis=1).astype("int32")
    settings = {**FIXED, "learning_rate": learning_rate}
    model, history = _fit(_text_model(), kp.KFAC(**settings), x=tokens, y=labels, epochs=5)
    assert not model.without_block
    assert history["loss"][-1] < history["loss"][0]


def test_subclassed_models_and_layers_of_the_users_own_are_searched():
    keras.utils.set_random_seed(0)
    network = _Subclassed()
    network(X[:1])
    model, history = _fit(network, kp.KFAC(**FIXED), epochs=4)
    assert [block.layer.name for block in model.blocks] == [
        network.first.name,
        network.own.inner.name,
    ]
    assert history["loss"][-1] < history["loss"][0]
    lines = []
    model.optimizer.summary(lines.append)
    assert any("scale" in line and "_Own" in line for line in lines)


def test_shared_layers_sum_their_factors_over_uses():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    shared = L.Dense(6, activation="tanh", name="shared")
    network = keras.Model(inputs, L.Dense(3)(shared(shared(inputs))))
    model, history = _fit(network, kp.KFAC(**FIXED), epochs=4)
    assert len(model.blocks) == 2
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize(
    "loss",
    ["mse", "poisson", "binary_crossentropy", "hinge", "huber"],
)
def test_losses_with_and_without_a_likelihood_train(loss):
    target = np.abs(X[:, :3]) if loss == "poisson" else (X[:, :3] > 0).astype("float32")
    last = {"activation": {"poisson": "exponential", "binary_crossentropy": "sigmoid"}.get(loss)}
    optimizer = kp.KFAC(**FIXED)
    if loss in ("hinge", "huber"):
        with pytest.warns(UserWarning, match="fall back on the empirical Fisher"):
            _, history = _fit(_network(**last), optimizer, y=target, loss=loss, epochs=4)
    else:
        _, history = _fit(_network(**last), optimizer, y=target, loss=loss, epochs=4)
    assert history["loss"][-1] < history["loss"][0]


FEATURES = {
    "schedule": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.9)},
    "schedules of other settings": {
        "momentum": keras.optimizers.schedules.PolynomialDecay(0.5, 8, 0.9),
        "damping": keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.9),
        "kl_clip": keras.optimizers.schedules.ExponentialDecay(1e-2, 4, 0.9),
    },
    "weight decay": {"weight_decay": 0.01},
    "clipnorm": {"clipnorm": 0.5},
    "global clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "average": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 4},
    "loss scale": {"loss_scale_factor": 128.0},
}


@pytest.mark.parametrize("learning_rate", ["fixed", "auto"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_the_base_class_work_and_survive_saving(feature, learning_rate, tmp_path):
    settings = {**FIXED, **FEATURES[feature]}
    if learning_rate == "auto":
        settings["learning_rate"] = "auto"
        settings.pop("ema_overwrite_frequency", None)  # refused where steps are judged
    model, history = _fit(_network(), kp.KFAC(**settings), epochs=5)
    assert history["loss"][-1] < history["loss"][0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.optimizer.get_config() == model.optimizer.get_config()
    for ours, theirs in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))


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


def test_larger_inputs_do_not_break_adaptive_steps():
    _, history = _fit(_network(), kp.KFAC(**SCALE_FREE), x=10 * X, epochs=4)
    assert history["loss"][-1] < 0.8 * history["loss"][0]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_trains(policy):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = L.Dense(8, activation="tanh", dtype=policy)(inputs)
    network = keras.Model(inputs, L.Dense(3, dtype="float32")(x))
    optimizer = keras.optimizers.LossScaleOptimizer(kp.KFAC(**FIXED), initial_scale=1024.0)
    _, history = _fit(network, optimizer, epochs=5)
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("settings", [FIXED, AUTO], ids=["fixed", "auto"])
@pytest.mark.parametrize("arguments", [{"jit_compile": True}, {"steps_per_execution": 2}], ids=str)
def test_compiled_variants_equal_the_plain_one(arguments, settings):
    # The empirical Fisher: XLA draws other labels.
    settings = {**settings, "labels": "data"}
    plain, _ = _fit(_network(), kp.KFAC(**settings), jit_compile=False)
    variant, _ = _fit(_network(), kp.KFAC(**settings), **{"jit_compile": False, **arguments})
    for ours, theirs in zip(_weights(plain), _weights(variant), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [FIXED, AUTO, {**FIXED, "inverse": "ekfac"}],
    ids=["fixed", "auto", "ekfac"],
)
def test_training_resumed_from_a_file_is_bit_equal(settings, tmp_path):
    whole = kp.KFACModel(_network(), seed=0)
    whole.compile(kp.KFAC(**settings), LOSS)
    whole.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    half = kp.KFACModel(_network(), seed=0)
    half.compile(kp.KFAC(**settings), LOSS)
    half.fit(X, Y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    half.save(tmp_path / "half.keras")
    resumed = keras.saving.load_model(tmp_path / "half.keras")
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
    target = X[:BATCH, :2] @ np.array([[1.0, 2.0], [0.5, -1.0]], "float32") + 1.0
    model = kp.KFACModel(network, seed=0)
    settings = {**AUTO, "damping": 1e-6, "labels": "exact"}
    model.compile(kp.KFAC(**settings), "mse")
    model.fit(X[:BATCH], target, batch_size=BATCH, epochs=1, verbose=0)
    # A (x) G is the exact Gauss-Newton matrix here, so one step is a Newton step.
    loss = float(model.evaluate(X[:BATCH], target, batch_size=BATCH, verbose=0))
    assert loss < 1e-4


def test_a_batch_with_nan_changes_nothing():
    model = kp.KFACModel(_network(), max_skipped_steps=2)
    model.compile(kp.KFAC(**AUTO), LOSS)
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


def test_several_losses_are_refused_where_one_is_needed():
    inputs = keras.Input((6,))
    network = keras.Model(inputs, [L.Dense(1)(inputs), L.Dense(1)(inputs)])
    with pytest.raises(InvalidArgumentError, match="one loss on one output"):
        kp.KFACModel(network).compile(kp.KFAC("auto"), ["mse", "mse"])


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
    pm.compile(kp.KFAC(**AUTO), LOSS)
    pm.fit(X, Y, batch_size=BATCH, epochs=6, verbose=0)
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


def test_labels_that_the_loss_ignores_need_no_class():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    y = np.where(np.arange(64) % 4 == 0, 255, Y)
    _, history = _fit(_network(), kp.KFAC(**FIXED), y=y, loss=loss, epochs=4)
    assert history["loss"][-1] < history["loss"][0]


class _UnusedHead(keras.Model):
    """A layer that is called but has no part in the output."""

    def __init__(self):
        super().__init__()
        self.head, self.unused = L.Dense(3), L.Dense(2)

    def call(self, x):
        self.unused(x)
        return self.head(x)


@pytest.mark.parametrize(
    "settings",
    [FIXED, AUTO, {**FIXED, "damping": kp.LevenbergMarquardt(0.1)}],
    ids=["fixed", "auto", "adaptive damping"],
)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_layer_without_a_gradient_stays_as_it_is(settings):
    keras.utils.set_random_seed(0)
    network = _UnusedHead()
    network(X[:1])
    before = to_numpy(network.unused.kernel)
    _, history = _fit(network, kp.KFAC(**settings), epochs=3)
    assert history["loss"][-1] < history["loss"][0]
    np.testing.assert_array_equal(network.unused.kernel, before)


@pytest.mark.parametrize("settings", [FIXED, AUTO], ids=["fixed", "auto"])
def test_a_network_in_double_precision_is_trained(settings):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), dtype="float64")
    hidden = L.Dense(8, activation="tanh", dtype="float64")(inputs)
    network = keras.Model(inputs, L.Dense(3, dtype="float64")(hidden))
    _, history = _fit(network, kp.KFAC(**settings), x=X.astype("float64"), epochs=4)
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_bad_batches_end_the_training_before_the_epoch_does(steps):
    model = kp.KFACModel(_network(), max_skipped_steps=8)
    model.compile(kp.KFAC(**FIXED), LOSS, steps_per_execution=steps)
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
    (state,) = optimizer._layout.states
    (moments,) = state.renewed
    factors = [tf.eye(7), tf.eye(3)]
    for step, value in ((8, 100.0), (9, 5.0), (10, 6.0)):
        optimizer.iterations.assign(step)
        optimizer.update_factors([[*factors, tf.fill((7, 3), value)]])
    # The eigenvalues of the identity, and the two moments since.
    np.testing.assert_allclose(to_numpy(moments), np.full((7, 3), 4.0), rtol=1e-5)
    with pytest.raises(InvalidArgumentError, match="inverse_every"):
        kp.KFAC(factor_every=4, inverse_every=4, inverse="ekfac")
