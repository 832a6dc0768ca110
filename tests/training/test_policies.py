"""Closing policies: what closes, what comes back, what never goes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GatePhase

to_numpy = keras.ops.convert_to_numpy
CRITERIA = ["kfac", "taylor", "magnitude", "random"]
POLICIES = ["hard_concrete", "proximal", *CRITERIA]
STEPS = 200


def _network():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    x = layers.Dense(6, activation="tanh", name="first")(inputs)
    x = layers.Dense(5, activation="tanh", name="second")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def _pruning(policy, budget=None, net=None):
    """A model in the middle of its prune phase, where the ramp has come down to the budget."""
    policy = kp.ScheduledClosing(policy, every=1) if policy in CRITERIA else policy
    model = kp.PrunableModel(
        net or _network(),
        budget or kp.Budget(macs=0.5),
        policy=policy,
        phases=kp.Phases(0.2, 0.4),
        seed=0,
    )
    model.controller.schedule(STEPS, None)
    model.controller.step.assign(int(0.5 * STEPS))
    model.controller.enter_due_phase()
    return model


def _move(model, gradient, steps=1):
    move = tf.function(lambda: model.controller.move_gates([tf.constant(gradient)]))
    for _ in range(steps):
        move()


def _open(model):
    return model.gated.gate_values() > 0


@pytest.mark.parametrize("policy", ["hard_concrete", "proximal", "kfac", "taylor"])
def test_a_closed_neuron_reopens_when_the_loss_calls_for_it(policy):
    room_for_every_other = 0.36
    model = _pruning(policy, kp.Budget(macs=room_for_every_other if policy in CRITERIA else 0.5))
    useless = np.arange(11) % 2 == 0
    _move(model, np.where(useless, 0.0, -1.0).astype("float32"), steps=40)
    assert not _open(model)[useless].any()
    assert _open(model)[~useless].any()
    _move(model, np.where(useless, -30.0, 0.0).astype("float32"), steps=60)
    assert int(model.controller.phase()) == GatePhase.PRUNING
    assert _open(model)[useless].any()


def test_a_closed_neuron_reopens_when_its_weights_have_grown():
    model = _pruning("magnitude")
    kernel = model.net.get_layer("second").kernel
    weights = np.ones(kernel.shape)
    for small in (2, 4):
        weights[:] = 1.0
        weights[small] = 0.0
        kernel.assign(weights)
        _move(model, np.zeros(11, "float32"))
        assert list(_open(model)[[2, 4]]) == [small != 2, small != 4]


@pytest.mark.parametrize("policy", POLICIES)
def test_no_layer_collapses_on_the_smallest_budget(policy):
    least = (4 + 1 + 3) / (24 + 30 + 15)
    model = _pruning(policy, kp.Budget(macs=least + 1e-6))
    _move(model, np.full(11, 1.0, "float32"), steps=5)
    if policy in CRITERIA:  # switched already
        assert [_open(model)[:6].sum(), _open(model)[6:].sum()] == [1, 1]
    model.controller.land()
    assert [_open(model)[:6].sum(), _open(model)[6:].sum()] == [1, 1]
    assert float(model.controller.fraction("macs")) == pytest.approx(least)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_switched_gates_obey_several_bounds_at_once_and_are_whole(criterion):
    budget = kp.Budget(macs=0.5, params=0.4)
    model = _pruning(criterion, budget)
    rng = np.random.default_rng(0)
    _move(model, rng.normal(size=11).astype("float32"))
    for measure, bound in budget.targets.items():
        assert float(model.controller.fraction(measure)) <= bound
    model.controller.land()
    assert set(model.gated.gate_values()) == {0.0, 1.0}


def test_the_order_of_random_closing_is_that_of_the_seed():
    kept = []
    for seed in (0, 0, 1):
        model = kp.PrunableModel(_network(), kp.Budget(macs=0.4), policy="random", seed=seed)
        model.controller.land()
        kept.append(_open(model))
    np.testing.assert_array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])


def test_magnitude_is_the_norm_of_the_weights_that_go_with_the_neuron():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(3, 3, name="stem")(inputs)
    y = layers.Conv2D(3, 3, padding="same", name="inner")(x)
    x = layers.Flatten()(layers.Add()([x, y]))
    net = keras.Model(inputs, layers.Dense(2, name="head")(x))
    model = _pruning("magnitude", net=net)
    kernels = (net.get_layer(name).kernel for name in ("stem", "inner", "head"))
    stem, inner, head = (to_numpy(kernel) for kernel in kernels)
    squares = sum((kernel**2).sum((0, 1, 2)) for kernel in (stem, inner))
    squares += (inner**2).sum((0, 1, 3)) + (head.reshape(-1, 3, 2) ** 2).sum((0, 2))
    found = to_numpy(model.controller.policy.criterion.saliency())
    norms = np.sqrt(squares)
    np.testing.assert_allclose(found, norms / norms.mean(), rtol=1e-5)


def test_magnitudes_of_layers_of_different_scale_are_compared():
    model = _pruning("magnitude")
    before = to_numpy(model.controller.policy.criterion.saliency())
    assert before[:6].mean() == pytest.approx(1.0)
    kernel = model.net.get_layer("first").kernel
    kernel.assign(100.0 * kernel)
    after = to_numpy(model.controller.policy.criterion.saliency())
    np.testing.assert_allclose(after[:6].mean(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(after[6:], before[6:], rtol=1e-5)


@pytest.mark.parametrize("policy", ["kfac", "taylor", "magnitude", "random", "proximal"])
def test_gates_move_alike_when_compiled_by_xla(policy):
    gradient = np.linspace(-1.0, 1.0, 11).astype("float32")
    found = []
    for compiled in (False, True):
        model = _pruning(policy)
        move = model.controller.move_gates
        tf.function(lambda m=move: m([tf.constant(gradient)]), jit_compile=compiled)()
        found.append(to_numpy(model.gated.gate_values()))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert found[0].min() < 1.0


def test_a_policy_round_trips_through_keras_serialization():
    policy = kp.ScheduledClosing("taylor", every=7)
    config = keras.saving.serialize_keras_object(policy)
    assert keras.saving.deserialize_keras_object(config) == policy
    model = kp.PrunableModel(_network(), kp.Budget(macs=0.5), policy=policy)
    clone = keras.models.clone_model(model)
    assert clone.policy == policy
    assert clone.get_config() == model.get_config()


def test_the_name_of_a_criterion_stands_for_the_policy():
    model = kp.PrunableModel(_network(), kp.Budget(macs=0.5), policy="kfac")
    assert model.policy == kp.ScheduledClosing("kfac")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "soft"}, "criterion='soft'"),
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        kp.ScheduledClosing(**arguments)


def test_gates_built_by_hand_must_be_of_the_kind_of_the_policy():
    inputs = keras.Input((4,))
    x = layers.Dense(6)(inputs)
    net = keras.Model(inputs, kp.layers.GatedDense(2, gate="deterministic", name="head")(x))
    with pytest.raises(InvalidArgumentError, match=r"'hard_concrete'.*'head_gate'.*'proximal'"):
        kp.PrunableModel(net, kp.Budget(macs=0.5), policy="hard_concrete")
    kp.PrunableModel(net, kp.Budget(macs=0.5), policy="taylor")


@pytest.mark.parametrize(
    ("gate", "policy"),
    [("deterministic", kp.ScheduledClosing("kfac")), ("hard_concrete", kp.HardConcreteGates())],
)
def test_by_default_the_policy_fits_gates_built_by_hand(gate, policy):
    inputs = keras.Input((4,))
    x = layers.Dense(6)(inputs)
    net = keras.Model(inputs, kp.layers.GatedDense(2, gate=gate, name="head")(x))
    assert kp.PrunableModel(net, kp.Budget(macs=0.5)).policy == policy


def test_by_default_neurons_are_closed_by_their_curvature():
    model = kp.PrunableModel(_network(), kp.Budget(macs=0.5))
    assert model.policy == kp.ScheduledClosing("kfac", every=20)


def test_curvature_without_a_likelihood_falls_back_with_a_warning():
    model = kp.PrunableModel(_network(), kp.Budget(macs=0.5), policy="kfac")
    with pytest.warns(UserWarning, match="KFACSaliency.*empirical Fisher.*hinge"):
        model.compile("sgd", "categorical_hinge")


def _data(*shape, n=96):
    x = np.random.default_rng(0).normal(size=(n, *shape)).astype("float32")
    flat = x.reshape(n, -1)
    return x, ((flat[:, 0] > 0).astype("int32") + (flat[:, 1] > 0.5)).astype("int32")


def test_a_run_interrupted_in_the_prune_phase_goes_on_as_if_nothing_had_happened(tmp_path):
    x, y = _data(4)

    def run(interrupt):
        policy = kp.ScheduledClosing("kfac", every=3)
        phases = kp.Phases(0.1, 0.5)
        model = kp.PrunableModel(
            _network(), kp.Budget(macs=0.4), policy=policy, phases=phases, seed=0
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.02), loss, run_eagerly=True)
        settings = {"batch_size": 16, "epochs": 4, "shuffle": False, "verbose": 0}
        if not interrupt:
            model.fit(x, y, **settings)
            return model
        stop = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1)
        )
        with pytest.warns(UserWarning, match="ended before its gates settled"):
            model.fit(x, y, **settings, callbacks=[stop])
        assert not _open(model).all()
        model.save(tmp_path / "half.keras")
        loaded = keras.models.load_model(tmp_path / "half.keras")
        loaded.fit(x, y, initial_epoch=2, **settings)
        return loaded

    straight, resumed = run(False), run(True)
    for a, b in zip(straight.weights, resumed.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b), err_msg=a.path)


def test_attention_and_residual_streams_are_closed_by_curvature():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6, 6, 2))
    x = layers.Reshape((9, 8))(layers.Conv2D(8, 2, strides=2, name="patches")(inputs))
    y = layers.LayerNormalization(name="norm")(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 4, name="attention")(y, y)])
    x = layers.GlobalAveragePooling1D()(x)
    net = keras.Model(inputs, layers.Dense(3, activation="softmax", name="head")(x))
    policy = kp.ScheduledClosing("kfac", every=2)
    model = kp.PrunableModel(net, kp.Budget(params=0.5), policy=policy, seed=0)
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)
    x, y = _data(6, 6, 2)
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0).history
    assert 0.3 < history["params"][-1] <= 0.5
    worth = to_numpy(model.controller.policy.criterion.curvature.value())
    for group in model.gated.channels.groups:
        assert worth[group.start : group.start + group.size].max() > 0, group.name
    small = kp.compact(model)
    np.testing.assert_allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
