"""Gate values in the three phases, gate layers and their serialization."""

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import (
    GateBank,
    GatedConv2D,
    GatedDense,
    GateEdge,
    GatePhase,
    HardConcrete,
    NeuronGate,
)


def _gate(kind="hard_concrete", size=6):
    gate = NeuronGate(kind=kind, seed=0)
    gate.build((None, size))
    return gate


def _hard_concrete_cdf(value, logit):
    """P(z <= value) by equation 11 of Louizos et al. 2018, in float64."""
    beta, gamma, zeta = HardConcrete.beta, HardConcrete.gamma, HardConcrete.zeta
    s = (value - gamma) / (zeta - gamma)
    return 1 / (1 + np.exp(-((np.log(s) - np.log(1 - s)) * beta - logit)))


@pytest.mark.parametrize("kind", ["hard_concrete", "deterministic"])
def test_held_open_gates_are_the_identity_to_the_bit(kind):
    gate = _gate(kind)
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    for training in (False, True):
        np.testing.assert_array_equal(gate(x, training=training), x)


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_sampled_gates_follow_the_hard_concrete_distribution(logit):
    gate = _gate(size=20_000)
    gate.parameters.assign(np.full(20_000, logit, "float32"))
    gate.phase.assign(int(GatePhase.PRUNING))
    z = np.array(gate.values(training=True))
    three_sigma = 3 * 0.5 / np.sqrt(20_000)
    for value in (0.0, 0.3, 0.7):
        expected = _hard_concrete_cdf(value, logit)
        assert abs(np.mean(z <= value) - expected) < three_sigma
    p_open = float(np.array(gate.open_probability())[0])
    assert p_open == pytest.approx(1 - _hard_concrete_cdf(0.0, logit), abs=1e-6)


def test_a_sampled_gate_changes_from_call_to_call_but_inference_does_not():
    gate = _gate()
    gate.phase.assign(int(GatePhase.PRUNING))
    gate.parameters.assign(np.zeros(6, "float32"))
    assert not np.array_equal(gate.values(training=True), gate.values(training=True))
    np.testing.assert_array_equal(gate.values(training=False), gate.values(training=False))


@pytest.mark.parametrize("kind", ["hard_concrete", "deterministic"])
def test_settling_keeps_exactly_what_it_was_told_to_keep(kind):
    gate = _gate(kind)
    closed = -5.0 if kind == "hard_concrete" else 0.0
    gate.phase.assign(int(GatePhase.PRUNING))
    gate.parameters.assign(np.array([closed, closed, 0.6, 0.6, 1.0, 1.0], "float32"))
    gate.settle(np.array([1, 0, 1, 0, 1, 0], "float32"))
    z = np.array(gate.deterministic_values())
    np.testing.assert_array_equal(z > 0, [True, False, True, False, True, False])
    assert z[0] == pytest.approx(0.5 if kind == "hard_concrete" else 1.0)
    np.testing.assert_array_equal(np.array(gate.values(training=True)), z)


@pytest.mark.parametrize("kind", ["hard_concrete", "deterministic"])
def test_set_values_are_the_values_with_exact_zeros_and_ones(kind):
    gate = _gate(kind)
    wanted = np.array([0.0, 1.0, 0.25, 0.5, 1.0, 0.0], "float32")
    gate.set_values(wanted)
    z = np.array(gate.deterministic_values())
    np.testing.assert_allclose(z, wanted, atol=1e-6)
    np.testing.assert_array_equal(z[[0, 1, 4, 5]], wanted[[0, 1, 4, 5]])


def test_a_closed_proximal_gate_still_feels_the_loss_and_can_reopen():
    import tensorflow as tf

    gate = _gate("deterministic")
    gate.phase.assign(int(GatePhase.PRUNING))
    gate.parameters.assign(np.zeros(6, "float32"))
    optimizer = keras.optimizers.SGD(0.1)
    with tf.GradientTape() as tape:
        loss = -tf.reduce_sum(gate(np.ones((1, 6), "float32"), training=True))
    optimizer.apply([tape.gradient(loss, gate.parameters.value)], [gate.parameters])
    np.testing.assert_allclose(np.array(gate.deterministic_values()), 0.1, atol=1e-6)
    with tf.GradientTape() as tape:
        loss = 100 * tf.reduce_sum(gate(np.ones((1, 6), "float32"), training=True))
    optimizer.apply([tape.gradient(loss, gate.parameters.value)], [gate.parameters])
    np.testing.assert_array_equal(np.array(gate.deterministic_values()), 0.0)


def test_gate_edge_applies_bank_values_by_index_and_leaves_other_channels_alone():
    inputs = keras.Input((3,))
    bank = GateBank([("a", 1), ("b", 1)], name="gates")
    model = keras.Model(inputs, GateEdge([1, 2, 0])([inputs, bank(inputs)[0]]))
    bank.set_values([0.5, 0.0])
    np.testing.assert_allclose(np.array(model(np.ones((2, 3)))), [[0.0, 1.0, 0.5]] * 2, atol=1e-6)


def test_gates_hand_masks_on():
    gate = _gate(size=4)
    x = keras.layers.Embedding(5, 4, mask_zero=True)(np.array([[1, 0, 2]]))
    mask = keras.src.backend.get_keras_mask(gate(x)) if hasattr(keras, "src") else None
    np.testing.assert_array_equal(np.array(mask), [[True, False, True]])


def test_models_with_gates_save_load_and_clone(tmp_path):
    inputs = keras.Input((6, 6, 1))
    x = GatedConv2D(4, 3, activation="relu", name="conv", gate="deterministic")(inputs)
    model = keras.Model(inputs, GatedDense(3, name="head")(keras.layers.Flatten()(x)))
    model.get_layer("head").gate.set_values(np.linspace(0, 1, 64))
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 1)).astype("float32")
    model.save(tmp_path / "gated.keras")
    loaded = keras.models.load_model(tmp_path / "gated.keras")
    np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))
    assert loaded.get_layer("conv").gate.kind == "deterministic"
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(np.array(clone(x)), np.array(model(x)))


def test_gates_stay_float32_under_mixed_precision():
    gate = NeuronGate(dtype="mixed_float16")
    gate.build((None, 3))
    assert gate.parameters.dtype == "float32"


def test_unknown_kind_names_the_layer_and_the_choices():
    with pytest.raises(InvalidArgumentError, match=r"'g1'.*hard_concrete.*kind='soft'"):
        NeuronGate(kind="soft", name="g1")


@pytest.mark.parametrize(("axis", "shape"), [(0, (None, 3)), (2, (None, 3)), (1, (None, None, 3))])
def test_a_gate_needs_a_channel_axis_of_known_size(axis, shape):
    with pytest.raises(InvalidArgumentError, match=f"axis={axis}"):
        NeuronGate(axis=axis).build(shape)


def test_gate_values_outside_the_unit_interval_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"range \[0.0, 2.0\]"):
        _gate(size=2).set_values([0.0, 2.0])
