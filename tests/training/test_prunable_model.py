"""One `fit` that trains and prunes: equality with Keras, phases, budgets, bad input, saving."""

import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tests.keras_features import needs_argument
from tf_kfacprune.errors import (
    BudgetError,
    DataError,
    InvalidArgumentError,
    NonFiniteError,
    UnsupportedModelError,
)
from tf_kfacprune.gates import GatePhase

to_numpy = keras.ops.convert_to_numpy
LOSS = "sparse_categorical_crossentropy"


def _network(normalized=False):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((10,), name="features")
    x = keras.layers.Dense(24, activation="relu", name="first")(inputs)
    if normalized:
        x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dense(16, activation="relu", name="second")(x)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="head")(x))


def _data(n=512):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 10)).astype("float32")
    y = (np.abs(x[:, 0]) + x[:, 1] > 0.8).astype("int32") + (x[:, 2] > 0.5)
    return x, y.astype("int32")


def _fit(model, optimizer=None, epochs=4, eager=True, batch_size=128, **kwargs):
    """Four steps an epoch; eager, as tracing steps of K-FAC takes longer than taking a few."""
    optimizer = optimizer or kp.KFAC(0.02)
    model.compile(optimizer, loss=LOSS, metrics=["accuracy"], run_eagerly=eager)
    x, y = _data()
    return model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0, **kwargs).history


class _StepLosses(keras.callbacks.Callback):
    """The mean loss after every step of the first epoch."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


@pytest.mark.parametrize(
    ("optimizer", "budgets"),
    [
        (keras.optimizers.SGD(0.1), [None, kp.Budget(macs=1.0)]),
        (keras.optimizers.Adam(1e-2), [kp.Budget(macs=1.0)]),
    ],
    ids=["sgd", "adam"],
)
def test_without_a_budget_to_meet_training_equals_plain_keras(optimizer, budgets):
    x, y = _data(640)

    def losses(model):
        config = keras.saving.serialize_keras_object(optimizer)
        model.compile(keras.saving.deserialize_keras_object(config), LOSS)
        recorder = _StepLosses()
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0, callbacks=[recorder])
        return recorder.losses

    expected = losses(_network(normalized=True))
    assert len(expected) == 20
    for budget in budgets:
        found = losses(kp.PrunableModel(_network(normalized=True), budget=budget))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0, err_msg=str(budget))


@pytest.mark.parametrize(
    ("policy", "budget"),
    [("hard_concrete", kp.Budget(macs=0.5, params=0.25)), ("proximal", kp.Budget(macs=0.3))],
    ids=str,
)
def test_the_network_lands_within_its_budget_and_compacts_to_the_same_function(budget, policy):
    model = kp.PrunableModel(_network(), budget=budget, policy=policy, seed=0)
    history = _fit(model)
    small = kp.compact(model)
    dense = _network()
    figures = {"macs": history["macs"][-1], "params": history["params"][-1]}
    assert figures["params"] == pytest.approx(small.count_params() / dense.count_params())
    for measure, target in budget.targets.items():
        assert figures[measure] <= target
    # One more neuron of the costliest layer would not fit.
    largest_neuron = 11 + 16
    slack = min(t - figures[m] for m, t in budget.targets.items())
    assert slack <= 2 * largest_neuron / dense.count_params()
    x, _ = _data()
    np.testing.assert_allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    assert type(small).__module__.startswith("keras")


@pytest.fixture(scope="module", name="run")
def compiled_run():
    """Accuracy, phases, gate values and learning rates of the epochs of one compiled `fit`."""
    keras.utils.set_random_seed(0)
    model = kp.PrunableModel(
        _network(), budget=kp.Budget(macs=0.3), phases=kp.Phases(warmup=0.25, prune=0.5), seed=0
    )
    epochs = []

    def watch(epoch, logs):
        phase, rate = int(model.controller.phase()), float(model.optimizer.learning_rate)
        epochs.append((logs["accuracy"], phase, model.gated.gate_values(), rate))

    watching = keras.callbacks.LambdaCallback(on_epoch_end=watch)
    _fit(model, epochs=24, eager=False, batch_size=32, callbacks=[watching])
    return tuple(zip(*epochs, strict=True))


def test_pruning_beats_chance_by_far(run):
    accuracies, *_ = run
    assert accuracies[-1] > 0.85


def test_every_phase_does_what_it_says(run):
    _, phases, values, rates = run
    held, pruning, settled = GatePhase.HELD_OPEN, GatePhase.PRUNING, GatePhase.SETTLED
    assert list(phases) == [held] * 6 + [pruning] * 12 + [settled] * 6
    assert all(np.all(v == 1.0) for v in values[:6])
    assert not np.array_equal(values[8], values[10])
    assert all(np.array_equal(v, values[-1]) for v in values[18:])
    assert set(rates[:18]) == {rates[0]}
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[17:]))


def test_a_learning_rate_schedule_of_the_user_is_left_alone():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.02, 100, 0.5)
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.3))
    _fit(model, kp.KFAC(schedule))
    assert float(model.optimizer.learning_rate) == pytest.approx(0.02 * 0.5**0.16, rel=1e-4)


def test_history_has_cost_neurons_price_and_radius():
    model = kp.PrunableModel(
        _network(),
        budget=kp.Budget(macs=0.3),
        curvature=kp.SpectralRadius(1e-3),
        policy="hard_concrete",
    )
    history = _fit(model, epochs=2)
    expected = {"loss", "accuracy", "macs", "expected_macs", "params", "expected_params"}
    expected |= {"neurons", "lambda", "spectral_radius", "skipped_steps"}
    assert set(history) == expected
    assert history["spectral_radius"][-1] > 0


def test_without_an_optimizer_it_is_kfac_with_weight_decay():
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.3))
    model.compile(loss="sparse_categorical_crossentropy")
    assert isinstance(model.optimizer, kp.KFAC)
    assert model.optimizer.weight_decay == 0.03
    assert float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.03)
    plain = kp.KFACModel(_network())
    plain.compile(loss="sparse_categorical_crossentropy")
    assert isinstance(plain.optimizer, kp.KFAC)
    assert plain.optimizer.weight_decay is None


def _drawn_anew(model, start, seed):
    """Brings a compiled model back to its start, with other weights."""
    for variable, value in start:
        variable.assign(value)
    for k, kernel in enumerate(v for v in model.net.trainable_variables if len(v.shape) > 1):
        kernel.assign(keras.initializers.GlorotUniform(seed=10 * seed + k)(kernel.shape))


@pytest.mark.slow
def test_the_penalty_leads_to_a_smaller_exact_eigenvalue():
    """Measured by Lanczos on the Gauss-Newton matrix of all data, not by the penalty itself.

    With 30 % wrong labels, as fitting them is what makes minima sharp.
    """
    x, y = _data()
    rng = np.random.default_rng(5)
    y = np.where(rng.random(len(y)) < 0.3, (y + rng.integers(1, 3, len(y))) % 3, y)
    epochs, seeds, top = 40, range(2), {}
    for strength in (0.0, 1.0):
        penalty = kp.SpectralRadius(strength, relative=False, every=1, batch_fraction=1.0)
        model = kp.PrunableModel(_network(), curvature=penalty if strength else None, seed=0)
        rate = keras.optimizers.schedules.CosineDecay(4e-2, 4 * epochs)
        model.compile(keras.optimizers.Adam(rate), loss=LOSS)
        start = [(v, to_numpy(v)) for v in [*model.variables, *model.optimizer.variables]]
        for seed in seeds:
            _drawn_anew(model, start, seed)
            model.fit(x, y, batch_size=128, epochs=epochs, verbose=0)
            spectrum = kp.diagnostics.hessian_spectrum(model, (x, y), LOSS, curvature="ggn")
            top[strength, seed] = float(spectrum.top)
    for seed in seeds:
        assert top[1.0, seed] < 0.5 * top[0.0, seed]  # 0.20 to 0.36 times in eight seeds


def test_gates_built_by_hand_are_used_as_they_are():
    inputs = keras.Input((10,))
    x = keras.layers.Dense(24, activation="relu", name="first")(inputs)
    x = kp.layers.GatedDense(16, activation="relu", name="second")(x)
    net = keras.Model(inputs, kp.layers.GatedDense(3, activation="softmax", name="head")(x))
    model = kp.PrunableModel(net, budget=kp.Budget(params=0.4), seed=0)
    assert model.net is net
    history = _fit(model, keras.optimizers.Adam(0.02))
    small = kp.compact(model)
    assert history["params"][-1] <= 0.4
    assert [layer.name for layer in small.layers[1:]] == ["first", "second", "head"]


def test_pruned_inputs_are_selected_in_the_compact_model():
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.1), prune_inputs=True, seed=0)
    _fit(model, keras.optimizers.Adam(0.02))
    small = kp.compact(model)
    assert small.input_shape == (None, 10)
    assert small.get_layer("first").kernel.shape[0] < 10


# ---------------------------------------------------------------------- not finite


def _snapshot(model):
    return [to_numpy(v) for v in [*model.net.weights, *model.optimizer.variables]]


def test_a_batch_with_nan_changes_nothing_and_is_counted():
    model = kp.PrunableModel(
        _network(normalized=True), budget=kp.Budget(macs=0.5), phases=kp.Phases(0.0, 0.5)
    )
    _fit(model, epochs=1)
    x, y = _data(32)
    x[5, 3] = np.nan
    before = _snapshot(model)
    logs = model.train_on_batch(x, y, return_dict=True)
    for old, new in zip(before, _snapshot(model), strict=True):
        np.testing.assert_array_equal(new, old)
    assert float(logs["skipped_steps"]) == 1
    assert np.isfinite(logs["loss"])


def test_training_ends_with_an_error_after_too_many_bad_batches():
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.5), max_skipped_steps=3)
    model.compile(kp.KFAC(0.02), LOSS, run_eagerly=True)
    x, y = _data(320)
    x[64:] = np.inf
    before = [to_numpy(v) for v in model.net.weights]
    with pytest.raises(NonFiniteError, match=r"in 4 training steps.*max_skipped_steps=3"):
        model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    after = [to_numpy(v) for v in model.net.weights]
    assert all(np.all(np.isfinite(v)) for v in after)
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_few_bad_batches_do_not_end_the_training():
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.5), max_skipped_steps=3)
    model.compile(kp.KFAC(0.02), LOSS, run_eagerly=True)
    x, y = _data(512)
    x[40] = x[200] = np.nan
    history = model.fit(x, y, batch_size=128, epochs=3, shuffle=False, verbose=0).history
    assert history["skipped_steps"] == [2, 4, 6]
    assert np.isfinite(history["loss"]).all()
    assert history["macs"][-1] <= 0.5


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("label", [3, -1])
def test_labels_out_of_range_are_refused_before_training(label):
    model = kp.PrunableModel(_network())
    model.compile("sgd", LOSS)
    x, y = _data(32)
    y[7] = label
    with pytest.raises(DataError, match=rf"0 to 2.*{label}"):
        model.fit(x, y, verbose=0)


def test_an_unreachable_budget_says_what_is_the_least():
    with pytest.raises(BudgetError, match=r"params=0.01 cannot be reached.*least.*params=0.0"):
        kp.PrunableModel(_network(), budget=kp.Budget(params=0.01))


def test_frozen_channels_are_named_when_they_keep_the_budget_out_of_reach():
    with pytest.raises(BudgetError, match="first"):
        kp.PrunableModel(_network(), budget=kp.Budget(macs=0.1), exclude=["first"])


def test_subclassed_and_unbuilt_models_are_refused():
    class Custom(keras.Model):
        def call(self, x):
            return x

    for model in (Custom(), keras.Sequential([keras.layers.Dense(3)])):
        with pytest.raises(UnsupportedModelError):
            kp.PrunableModel(model, budget=kp.Budget(macs=0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.1}, "budget=0.1"),
        ({"curvature": 1e-3}, "curvature=0.001"),
        ({"phases": (0.1, 0.5)}, "phases="),
        ({"max_skipped_steps": 0}, "max_skipped_steps=0"),
        ({"policy": "soft"}, "policy='soft'"),
    ],
    ids=["budget", "curvature", "phases", "max_skipped_steps", "policy"],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        kp.PrunableModel(_network(), **arguments)


def test_data_of_unknown_length_need_the_number_of_steps():
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.5))
    model.compile("sgd", LOSS, run_eagerly=True)
    x, y = _data(64)

    def batches():
        while True:
            yield x, y

    with pytest.raises(InvalidArgumentError, match="steps_per_epoch"):
        model.fit(batches(), epochs=1, shuffle=False, verbose=0)
    model.fit(batches(), epochs=2, steps_per_epoch=4, shuffle=False, verbose=0)


def test_phases_of_data_of_unknown_length_are_those_of_as_many_steps():
    x, y = _data(40)
    counted = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)  # 5 steps
    phases = {}
    for name, batches in (("known", counted), ("unknown", counted.filter(lambda *_: True))):
        model = kp.PrunableModel(
            _network(),
            budget=kp.Budget(macs=0.5),
            policy="magnitude",
            phases=kp.Phases(warmup=0.2, prune=0.4),
        )
        model.compile(keras.optimizers.SGD(0.1), LOSS, run_eagerly=True)
        if name == "unknown":
            with pytest.raises(InvalidArgumentError, match=r"plan_phases\(epochs \* batches\)"):
                model.fit(batches, epochs=2, shuffle=False, verbose=0)
            model.plan_phases(10)
        phases[name] = seen = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, model=model, seen=seen: seen.append(
                (model.controller.phase_now(), float(model.optimizer.learning_rate))
            )
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Your input ran out of data")
            model.fit(batches, epochs=2, shuffle=False, verbose=0, callbacks=[note])
    assert phases["unknown"] == phases["known"]
    assert len(phases["known"]) == 10
    assert {phase for phase, _ in phases["known"]} == set(GatePhase)


@needs_argument(keras.layers.BatchNormalization, "renorm")
def test_the_penalty_refuses_layers_with_wrong_second_derivatives_by_name():
    def wrapped(layer, strength=1e-3):
        inputs = keras.Input((4, 4, 1))
        x = layer(keras.layers.Conv2D(1, 1)(inputs))
        net = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
        return kp.PrunableModel(net, curvature=kp.SpectralRadius(strength))

    renormalized = keras.layers.BatchNormalization(renorm=True, name="norm")
    with pytest.raises(UnsupportedModelError, match=r"'norm' .*renorm=True"):
        wrapped(renormalized)
    wrapped(renormalized, strength=0.0)
    wrapped(keras.layers.UpSampling2D(interpolation="bilinear"))  # run by a right expression
    own = keras.layers.Lambda(lambda x: keras.ops.image.resize(x, (5, 5)), (5, 5, 1), name="own")
    with pytest.raises(UnsupportedModelError, match=r"/own.*ResizeBilinear"):
        wrapped(own)
    wrapped(keras.layers.Lambda(lambda x: 2 * x, name="own"))


def test_a_budget_of_what_costs_nothing_is_refused():
    user, item = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    factors = [keras.layers.Embedding(9, 4)(x) for x in (user, item)]
    network = keras.Model([user, item], keras.layers.Dot(1)(factors))
    with pytest.raises(BudgetError, match=r"macs=0.4 bounds nothing.*params"):
        kp.PrunableModel(network, kp.Budget(macs=0.4, params=0.5))


def test_flash_and_ram_of_layers_that_no_runtime_has_confirmed_are_warned_of(recwarn):
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(4, 3, name="plain")(inputs)
    known = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    kp.PrunableModel(known, kp.Budget(flash=0.99))
    x = keras.layers.UnitNormalization(name="unit")(x)
    unknown = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    kp.PrunableModel(unknown, kp.Budget(macs=0.8))
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"'unit' \(UnitNormalization\).*budget of flash.*check_micro"
    ):
        kp.PrunableModel(unknown, kp.Budget(flash=0.99))


def test_a_loss_without_a_likelihood_falls_back_with_a_warning():
    model = kp.PrunableModel(_network())
    with pytest.warns(UserWarning, match="KFAC.*empirical Fisher.*hinge"):
        model.compile(kp.KFAC(), "categorical_hinge")


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras before 3.15")
def test_an_optimizer_for_each_part_trains_as_in_keras():
    def optimizer():
        parts = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.05))
        parts["second.*"] = keras.optimizers.Adam(1e-2)
        return keras.optimizers.MultiOptimizer(parts)

    network = _network()
    network.compile(optimizer(), LOSS, run_eagerly=True)
    x, y = _data(64)
    network.fit(x, y, shuffle=False, verbose=0)
    trainer = kp.KFACModel(_network())
    trainer.compile(optimizer(), LOSS, run_eagerly=True)
    trainer.fit(x, y, shuffle=False, verbose=0)
    for weight, expected in zip(trainer.net.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-6)
    model = kp.PrunableModel(_network(), kp.Budget(macs=0.5), phases=kp.Phases(0.0, 0.5))
    _fit(model, optimizer(), epochs=2)
    assert model.has_settled


def test_gates_are_not_among_the_variables_that_an_optimizer_may_train():
    model = kp.PrunableModel(_network(), kp.Budget(macs=0.5))
    assert model.trainable_variables == model.trainable_weights
    assert not any("gate" in variable.path for variable in model.trainable_variables)


# ---------------------------------------------------------------------- saving


def test_export_of_keras_is_for_networks_without_gates(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"still has gates.*kp.compact"):
        kp.PrunableModel(_network()).export(tmp_path / "gated")
    trainer = kp.KFACModel(_network())
    trainer.export(tmp_path / "saved", verbose=False)
    x, _ = _data(4)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(x), trainer.predict(x, verbose=0), atol=1e-5)


def test_a_model_saved_in_mid_pruning_goes_on_as_if_nothing_had_happened(tmp_path):
    model = kp.PrunableModel(
        _network(normalized=True),
        budget=kp.Budget(macs=0.4),
        curvature=kp.SpectralRadius(1e-3, labels="data"),
        policy="proximal",
        phases=kp.Phases(0.1, 0.5),
    )
    saving = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    _fit(model, kp.KFAC(0.02, labels="data"), shuffle=False, callbacks=[saving])
    resumed = keras.models.load_model(tmp_path / "2.keras")
    assert int(resumed.controller.phase()) == GatePhase.PRUNING
    x, y = _data()
    resumed.fit(x, y, batch_size=128, initial_epoch=2, epochs=4, shuffle=False, verbose=0)
    for a, b in zip(model.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b), err_msg=a.path)


def test_network_variables_leave_the_gates_to_their_own_optimizer():
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.5))
    paths = [v.path for v in model.network_variables]
    assert len(paths) == 6
    assert not any("logits" in path for path in paths)


@pytest.mark.parametrize(
    "policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)]
)
def test_mixed_precision_trains_prunes_and_compacts(policy):
    keras.config.set_dtype_policy(policy)
    try:
        net = _network(normalized=True)
    finally:
        keras.config.set_dtype_policy("float32")
    model = kp.PrunableModel(net, budget=kp.Budget(macs=0.4), curvature=kp.SpectralRadius(1e-3))
    history = _fit(model)
    assert history["macs"][-1] <= 0.4
    assert history["skipped_steps"][-1] == 0
    small = kp.compact(model)  # verified: the same function, in the same precision
    assert small.get_layer("first").dtype_policy.name == policy


@pytest.mark.parametrize("closing", ["kfac", "hard_concrete"])
def test_gradients_that_overflow_leave_the_gates_alone(closing):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = kp.PrunableModel(_network(), kp.Budget(macs=0.4), policy=closing, seed=0)
        # Lowered at every overflow, raised again after two good steps, all through the run.
        scaled = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(0.02), initial_scale=2.0**30, dynamic_growth_steps=2
        )
        history = _fit(model, scaled)
    finally:
        keras.config.set_dtype_policy("float32")
    assert int(scaled.iterations) < 4 * 4
    for variable in model.controller.variables:
        assert np.all(np.isfinite(to_numpy(variable))), variable.path
    assert history["macs"][-1] <= 0.4


def test_gates_that_exist_already_cannot_be_configured_again():
    gated = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.4)).net
    with pytest.raises(InvalidArgumentError, match="gates already"):
        kp.PrunableModel(gated, budget=kp.Budget(macs=0.4), prune_inputs=True)


def test_a_clone_has_the_same_architecture_and_budget():
    model = kp.PrunableModel(_network(), budget=kp.Budget(macs=0.4), seed=3)
    clone = keras.models.clone_model(model)
    assert clone.get_config() == model.get_config()
    assert clone.count_params() == model.count_params()
