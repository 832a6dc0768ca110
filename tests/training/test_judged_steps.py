"""Adaptive damping: steps that did harm are taken back."""

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError

L = keras.layers
to_numpy = keras.ops.convert_to_numpy
BATCH = 32
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, 6)).astype("float32")
Y = (X[:, :3].sum(axis=1) > 0).astype("int32") + (X[:, 3] > 1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _after_one_step(activation=None, loss=LOSS):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    x = L.BatchNormalization(name="norm")(L.Dense(8, activation="tanh")(inputs))
    network = keras.Model(inputs, L.Dense(3, activation=activation)(x))
    model = kp.KFACModel(network, seed=0)
    damping = kp.LevenbergMarquardt(0.1, every=3)
    # Compiled steps take seconds to trace, and are compared with these in test_kfac_model.py.
    optimizer = kp.KFAC("auto", damping=damping, batch_fraction=1.0)
    model.compile(optimizer, loss, run_eagerly=True)
    _train(model)
    return model


def _train(model, x=X):
    y = Y if model.loss is LOSS else np.ones((BATCH, 3), "float32")
    return model.fit(x, y, batch_size=BATCH, verbose=0).history


def _values(variables):
    return [to_numpy(v) for v in variables]


def _gone_astray(model, size):
    """Makes the last step a large one; returns what the variables were before it."""
    optimizer = model.optimizer
    before = _values(optimizer.block_variables)
    for place, variable in zip(
        optimizer._curvature.in_blocks, optimizer.block_variables, strict=True
    ):
        step = size * np.sign(RNG.normal(size=variable.shape)).astype("float32")
        optimizer._momentums[place].assign(step)
        variable.assign(variable - step)
    return before


def _assert_inverted_with(optimizer, damping):
    """Inverses are those of the averages with factored damping, reckoned in float64."""
    curvature = optimizer._curvature
    weight = float(to_numpy(curvature._average_weight))
    for state in curvature.states:
        a, g = (to_numpy(f.averages[0]).astype("float64") / weight for f in (state.a, state.g))
        traces = [np.trace(m, axis1=-2, axis2=-1) / m.shape[-1] for m in (a, g)]
        pi = np.sqrt(traces[0] / traces[1])[..., None, None]
        for factor, matrix, shift in ((state.a, a, pi), (state.g, g, 1.0 / pi)):
            damped = matrix + shift * np.sqrt(damping) * np.eye(matrix.shape[-1])
            expected = np.linalg.inv(damped)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                to_numpy(factor.inverses[0]), expected, rtol=1e-3, atol=1e-4 * scale
            )


def _assert_taken_back(model, size):
    statistics = _values(model.net.get_layer("norm").non_trainable_variables)
    damping = float(model.optimizer.current_damping)
    before = _gone_astray(model, size)
    assert _train(model)["rejected_steps"] == [1]
    for old, new in zip(before, _values(model.optimizer.block_variables), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)
    now = _values(model.net.get_layer("norm").non_trainable_variables)
    for old, new in zip(statistics, now, strict=True):
        np.testing.assert_array_equal(new, old)
    optimizer = model.optimizer
    assert float(optimizer.current_damping) == pytest.approx(3.0 * damping)
    _assert_inverted_with(optimizer, 3.0 * damping)
    assert int(model.optimizer.iterations) == 1
    assert _train(model)["rejected_steps"] == [1]
    assert int(model.optimizer.iterations) == 2


def test_a_harmful_step_is_taken_back():
    _assert_taken_back(_after_one_step(), 4.0)


def test_a_step_that_made_the_loss_infinite_is_taken_back_at_once():
    model = _after_one_step("exponential", "mse")
    _assert_taken_back(model, 100.0)
    assert int(model.guard.skipped) == 1


def test_a_step_that_made_the_loss_jump_is_taken_back_before_it_is_due():
    model = _after_one_step()
    for _ in range(3):
        _train(model)
    assert int(model.optimizer.iterations) == 4  # judged after every third step
    before = _gone_astray(model, 30.0)
    assert _train(model)["rejected_steps"] == [1]
    for old, new in zip(before, _values(model.optimizer.block_variables), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)


def test_a_step_is_not_to_blame_for_a_bad_batch():
    model = _after_one_step()
    before = _values([*model.optimizer.block_variables, *model.optimizer.variables])
    assert _train(model, np.full_like(X, np.nan))["rejected_steps"] == [0]
    after = _values([*model.optimizer.block_variables, *model.optimizer.variables])
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.slow
def test_a_deep_network_recovers_from_damping_far_too_small():
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((24,))
    for width in (96, 48, 4, 48, 96):
        x = L.Dense(width, activation="relu")(x)
    model = kp.KFACModel(keras.Model(inputs, L.Dense(24)(x)), seed=0)
    rng = np.random.default_rng(0)
    images = (rng.normal(size=(512, 24)) @ rng.normal(size=(24, 24)) > 0).astype("float32")
    damping = kp.LevenbergMarquardt(1e-8, maximum=1.0)
    model.compile(kp.KFAC("auto", damping=damping), keras.losses.BinaryCrossentropy(True))
    history = model.fit(images, images, batch_size=128, epochs=10, verbose=0).history
    assert history["rejected_steps"][-1] > 0
    assert history["loss"][-1] < 0.6


def test_what_cannot_be_taken_back_is_refused():
    inputs = keras.Input((6,))
    outputs = L.Dense(3, kernel_constraint="non_neg")(inputs)
    model = kp.KFACModel(keras.Model(inputs, outputs))
    model.compile(kp.KFAC(0.01), LOSS)
    with pytest.raises(InvalidArgumentError, match="a constraint has moved"):
        model.compile(kp.KFAC("auto"), LOSS)
    with pytest.raises(InvalidArgumentError, match="ema_overwrite_frequency"):
        kp.KFAC("auto", use_ema=True, ema_overwrite_frequency=5)


def test_weight_decay_follows_the_step_sizes_that_were_taken():
    of_first, of_second = [], []
    for decay in (None, 0.1):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((6,))
        model = kp.KFACModel(keras.Model(inputs, L.Dense(3)(L.Dense(8)(inputs))), seed=0)
        model.compile(kp.KFAC("auto", weight_decay=decay), LOSS, run_eagerly=True)
        _train(model)
        of_first.append(model.net.get_weights())
        rate = max(float(model.optimizer.learning_rate), 0.0)
        model.optimizer._apply_weight_decay(model.optimizer.block_variables)
        of_second.append(model.net.get_weights())
    for plain, decayed in zip(*of_first, strict=True):
        np.testing.assert_allclose(decayed, plain, rtol=1e-5, atol=1e-6)
    for plain, decayed in zip(*of_second, strict=True):
        np.testing.assert_allclose(decayed, (1.0 - 0.1 * rate) * plain, rtol=1e-4, atol=1e-6)
    assert rate > 0


def test_a_step_is_judged_on_the_first_good_batch_after_a_bad_one():
    model = _after_one_step()
    before = _gone_astray(model, 4.0)
    assert _train(model, np.full_like(X, np.nan))["rejected_steps"] == [0]
    assert _train(model)["rejected_steps"] == [1]
    for old, new in zip(before, _values(model.optimizer.block_variables), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)


@pytest.mark.parametrize("kind", ["weights", "activities", "add_loss"])
def test_the_quadratic_model_knows_what_layers_add_to_the_loss(kind):
    """Of a linear network with squared loss it is the loss: it predicts the change exactly."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    regularizer = {} if kind == "add_loss" else {f"{_OF[kind]}_regularizer": "l2"}
    if kind == "weights":
        regularizer["kernel_regularizer"] = keras.regularizers.L2(0.5)
    layer = L.Dense(3, **regularizer)
    network = keras.Model(
        inputs, (_Adding() if kind == "add_loss" else L.Identity())(layer(inputs))
    )
    model = kp.KFACModel(network, seed=0)
    damping = kp.LevenbergMarquardt(1e-6, minimum=1e-8)
    optimizer = kp.KFAC("auto", damping=damping, batch_fraction=1.0)
    model.compile(optimizer, "mse", run_eagerly=True)
    y = RNG.normal(size=(BATCH, 3)).astype("float32")
    before = model.evaluate(X, y, batch_size=BATCH, verbose=0)
    model.train_on_batch(X, y)
    change = model.evaluate(X, y, batch_size=BATCH, verbose=0) - before
    predicted = float(optimizer.adaptive_damping._predicted_change)
    assert predicted < -0.1
    assert predicted == pytest.approx(change, rel=1e-3)


_OF = {"weights": "kernel", "activities": "activity"}


class _Adding(keras.layers.Layer):
    """Adds the mean square of what it reads to the loss."""

    def call(self, x):
        self.add_loss(0.3 * keras.ops.mean(x**2))
        return x


def test_losses_of_activations_on_a_part_of_the_batch_are_refused():
    inputs = keras.Input((6,))
    network = keras.Model(inputs, L.Dense(3, activity_regularizer="l2")(inputs))
    model = kp.KFACModel(network)
    model.compile(kp.KFAC("auto"), LOSS)
    with pytest.raises(InvalidArgumentError, match="batch_fraction=1"):
        _train(model)


def test_a_step_after_an_overflow_of_the_loss_scale_is_judged_once():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    hidden = L.Dense(8, "tanh", dtype="mixed_float16")(inputs)
    model = kp.KFACModel(keras.Model(inputs, L.Dense(3, dtype="float32")(hidden)), seed=0)
    damping = kp.LevenbergMarquardt(0.5, decay=0.5, every=1)
    kfac = kp.KFAC("auto", damping=damping, batch_fraction=1.0)
    scaled = keras.optimizers.LossScaleOptimizer(
        kfac, initial_scale=64.0, dynamic_growth_steps=1000
    )
    model.compile(scaled, LOSS, run_eagerly=True)
    _train(model)
    scaled.dynamic_scale.assign(2.0**40)  # the next step overflows
    _train(model)
    assert int(kfac.iterations) == 1
    judged = float(kfac.current_damping)
    assert judged in (0.25, 0.5, 1.0, 1.5)
    scaled.dynamic_scale.assign(64.0)
    _train(model)
    assert int(kfac.iterations) == 2
    assert float(kfac.current_damping) == judged


def _exact_steps(**clipping):
    damping = kp.LevenbergMarquardt(1e-6, every=1)
    return kp.KFAC("auto", damping=damping, batch_fraction=1.0, labels="exact", **clipping)


def _linear_model(optimizer, strength):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    network = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    penalty = None if strength is None else kp.SpectralRadius(strength, every=1)
    model = kp.PrunableModel(network, curvature=penalty, seed=0)
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize(
    "clipping",
    [{}, {"global_clipnorm": 0.1}, {"clipnorm": 0.1}, {"clipvalue": 0.02}],
    ids=["plain", "global norm", "norm", "value"],
)
@pytest.mark.parametrize("strength", [None, 1e3])
def test_what_is_expected_of_a_step_is_about_the_loss_whatever_else_it_follows(strength, clipping):
    """A linear model with squared loss is its own quadratic model: its change is known exactly."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype("float32")
    y = (x @ rng.normal(size=(6, 2)) + rng.normal(size=(32, 2))).astype("float32")
    model = _linear_model(_exact_steps(**clipping), strength)
    optimizer = model.optimizer
    for _ in range(3):
        before = model.evaluate(x, y, batch_size=32, verbose=0)
        model.train_on_batch(x, y)
        after = model.evaluate(x, y, batch_size=32, verbose=0)
        predicted = float(optimizer.adaptive_damping._predicted_change)
        np.testing.assert_allclose(predicted, after - before, rtol=1e-3, atol=1e-6)
        assert predicted < 0


@pytest.mark.parametrize("strength", [None, 1e-3, 1e3])
def test_clipping_shortens_steps_of_the_quadratic_model_with_a_penalty_as_without(strength):
    x, y = X, np.random.default_rng(1).normal(size=(BATCH, 2)).astype("float32")

    def move(optimizer):
        model = _linear_model(optimizer, strength)
        before = np.concatenate([v.ravel() for v in model.net.get_weights()])
        model.train_on_batch(x, y)
        return before - np.concatenate([v.ravel() for v in model.net.get_weights()])

    share = 0.05 / np.linalg.norm(move(keras.optimizers.SGD(1.0)))  # that moves by the gradient
    assert share < 0.2
    clipped, whole = (move(_exact_steps(**c)) for c in ({"global_clipnorm": 0.05}, {}))
    np.testing.assert_allclose(clipped, share * whole, rtol=0, atol=1e-4 * np.abs(clipped).max())


def test_clipping_is_by_the_norm_of_the_sum_where_a_token_comes_twice():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="int32")
    network = keras.Model(inputs, L.Dense(1)(L.Flatten()(L.Embedding(5, 2)(inputs))))
    x, y = np.array([[1, 1, 1, 2], [1, 1, 1, 1]]), np.ones((2, 1), "float32")
    model = kp.KFACModel(network, seed=0)
    optimizer = kp.KFAC(1.0, momentum=0.0, global_clipnorm=0.1, kl_clip=None, damping=1e12)
    model.compile(optimizer, "mse", run_eagerly=True)
    model.train_on_batch(x, y)
    # With so much damping the step of every block is its gradient over the damping.
    seen = [np.array(optimizer._momentums[k]) * 1e12 for k in range(3)]
    assert np.sqrt(sum(np.sum(g.astype("float64") ** 2) for g in seen)) == pytest.approx(0.1, 1e-4)


def test_damping_begins_with_the_first_batch_that_has_curvature():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    model = kp.KFACModel(keras.Model(inputs, L.Dense(2)(L.Dense(4, "tanh")(inputs))), seed=0)
    optimizer = kp.KFAC("auto", labels="exact", factor_every=1, factor_decay=0.0)
    model.compile(optimizer, "mse", run_eagerly=True)
    y = np.random.default_rng(1).normal(size=(BATCH, 2)).astype("float32")
    model.train_on_batch(X, y, sample_weight=np.zeros(BATCH, "float32"))
    assert float(optimizer.current_damping) == pytest.approx(1e-2)
    model.train_on_batch(X, y)
    plain = squared = 0.0
    for state in optimizer._curvature.states:
        a, g = (np.array(f.averages[0]).astype("float64") for f in (state.a, state.g))
        plain += np.trace(a) * np.trace(g)
        squared += np.sum(a**2) * np.sum(g**2)
    assert float(optimizer.current_damping) == pytest.approx(0.3 * squared / plain, rel=1e-4)
