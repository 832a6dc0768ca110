"""Curvature along gates, against factors of the blocks, NumPy and losses with gates switched."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_kfacprune.curvature import (
    Batch,
    CurvatureEstimator,
    SingleObjective,
    find_blocks,
    find_gate_layers,
    gate_curvature,
)
from tf_kfacprune.gates import GatedNetwork, GatePhase, insert_gates
from tf_kfacprune.layers import GatedDense

to_numpy = keras.ops.convert_to_numpy
BATCH = 7


def _gated(net, gates=None):
    """The network with its gates at given values, as while pruning."""
    gated = GatedNetwork(insert_gates(net))
    return _switched(gated, np.ones(gated.num_gates) if gates is None else gates)


def _switched(gated, gates):
    first = 0
    for source in gated.sources:
        source.kind = "deterministic"
        source.parameters.assign(np.asarray(gates)[first : first + source.size])
        source.phase.assign(int(GatePhase.PRUNING))
        first += source.size
    return gated


def _inputs(*shape):
    rng = np.random.default_rng(1)
    return tf.constant(rng.normal(size=(BATCH, *shape)).astype("float32"))


def _linear(y_true, outputs):
    """A loss whose gradient does not depend on the outputs, nor on the gates in between."""
    del y_true
    weights = tf.reshape(tf.linspace(-1.0, 2.0, outputs.shape[-1]), [1, -1])
    return tf.reduce_sum(outputs * weights, axis=-1)


def _squares(y_true, outputs):
    del y_true
    return tf.reduce_sum(tf.square(outputs - 0.3), axis=-1)


def _curvature(gated, x, loss, labels="data", weights=None, y=None):
    estimator = CurvatureEstimator(gated.net, SingleObjective(loss))
    batch = Batch(x, np.zeros((len(x), 1), "float32") if y is None else y, weights)
    layers = find_gate_layers(gated)
    return to_numpy(gate_curvature(gated, layers, estimator, batch, labels, training=False))


@pytest.mark.parametrize("readers", [1, 2])
def test_it_is_the_quadratic_form_of_kfac_for_the_removal_from_all_readers(readers):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    hidden = layers.Dense(6, activation="tanh", name="hidden")(inputs)
    outputs = [layers.Dense(n, name=f"reader{n}")(hidden) for n in (3, 4)[:readers]]
    net = keras.Model(inputs, layers.Concatenate()(outputs) if readers > 1 else outputs[0])
    gated, x = _gated(net), _inputs(5)
    blocks = [b for b in find_blocks(gated.net).blocks if b.layer.name.startswith("reader")]
    estimator = CurvatureEstimator(gated.net, SingleObjective(_squares))
    batch = Batch(x, np.zeros((BATCH, 1), "float32"))
    look = estimator.look(batch, blocks, "data", training=False)
    (g,) = look.probes
    a = to_numpy(blocks[0].factor_a(look.records[0], g[0])).astype("float64")
    # Readers behind one gate are one contraction, its weights and gradients side by side.
    g = np.concatenate([to_numpy(part) for part in g], axis=1).astype("float64")
    w = np.concatenate([to_numpy(block.layer.kernel) for block in blocks], axis=1)
    expected = np.diag(a)[:6] * np.einsum("io,op,ip->i", w, g.T @ g / BATCH, w)
    np.testing.assert_allclose(_curvature(gated, x, _squares), expected, rtol=2e-5)


@pytest.mark.parametrize("shape", [(6, 5, 2), (9, 2)], ids=["images", "sequences"])
def test_locations_add_up_in_activations_and_average_in_gradients(shape):
    keras.utils.set_random_seed(3)
    conv = layers.Conv2D if len(shape) == 3 else layers.Conv1D
    inputs = keras.Input(shape)
    hidden = conv(4, 3, activation="tanh", name="hidden")(inputs)
    outputs = conv(3, 2, padding="same", name="reader")(hidden)
    net = keras.Model(inputs, layers.Reshape((-1,))(outputs))
    x = _inputs(*shape)
    with tf.GradientTape() as tape:
        a = net.get_layer("hidden")(x)
        tape.watch(a)
        loss = tf.reduce_sum(_linear(None, tf.reshape(net.get_layer("reader")(a), [BATCH, -1])))
    h = to_numpy(tape.gradient(loss, a)).astype("float64").reshape(BATCH, -1, 4)
    a = to_numpy(a).astype("float64").reshape(BATCH, -1, 4)
    expected = (a**2).sum(1).mean(0) * (h**2).mean((0, 1))
    np.testing.assert_allclose(_curvature(_gated(net), x, _linear), expected, rtol=2e-5)


def test_closed_gates_have_the_curvature_of_reopening():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    hidden = layers.Dense(6, activation="tanh", name="hidden")(inputs)
    gated = _gated(keras.Model(inputs, layers.Dense(3, name="head")(hidden)))
    x = _inputs(5)
    opened = _curvature(gated, x, _linear)
    closed = _curvature(_switched(gated, [0, 1, 0, 1, 1, 0]), x, _linear)
    assert opened.min() > 0
    np.testing.assert_allclose(closed, opened, rtol=1e-5)


def test_with_slope_it_is_the_loss_without_the_neuron_where_the_loss_is_quadratic():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    hidden = layers.Dense(6, activation="tanh", name="hidden")(inputs)
    gated = _gated(keras.Model(inputs, layers.Dense(3, name="head")(hidden)))
    x, y = _inputs(5), _inputs(3)
    z = np.array([1, 0, 1, 1, 0, 1], "float32")
    curvature = _curvature(_switched(gated, z), x, "mse", "exact", y=y)

    def loss(gates):
        _switched(gated, gates)
        return tf.reduce_mean(tf.square(gated.net(x, training=False) - y))

    with tf.GradientTape() as tape:
        here = loss(z)
    slope = to_numpy(tape.gradient(here, gated.sources[0].parameters.value))
    worth = -slope + (z - 0.5) * curvature
    for k in range(6):
        closed, opened = (np.where(np.arange(6) == k, value, z) for value in (0.0, 1.0))
        assert worth[k] == pytest.approx(float(loss(closed) - loss(opened)), rel=1e-4)


def test_neurons_that_are_gated_inside_a_layer_are_seen_by_their_gates():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4, 6))
    attended = layers.MultiHeadAttention(3, 4, name="attention")(inputs, inputs)
    pooled = layers.GlobalAveragePooling1D()(attended)
    gated = _gated(keras.Model(inputs, layers.Dense(2, name="head")(pooled)))
    x = _inputs(4, 6)[:1]  # one example has no others to be told from
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(_squares(None, gated.net(x, training=False)))
    slope = to_numpy(tape.gradient(loss, gated.sources[0].parameters.value))
    inside = np.array([":" in g.name or "attention" in g.name for g in gated.channels.groups])
    found = _curvature(gated, x, _squares)
    checked = 0
    for group, is_inside in zip(gated.channels.groups, inside, strict=True):
        members = slice(group.start, group.start + group.size)
        if is_inside:
            np.testing.assert_allclose(found[members], slope[members] ** 2, rtol=1e-3, atol=1e-8)
            checked += group.size
    assert checked


def test_gates_of_models_built_by_hand_are_found():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    hidden = layers.Dense(6, activation="tanh")(inputs)
    hidden = GatedDense(4, activation="tanh", gate="deterministic")(hidden)
    by_hand = keras.Model(inputs, GatedDense(2, gate="deterministic")(hidden))
    gated = _switched(GatedNetwork(by_hand), np.ones(10))
    twin = keras.Sequential([keras.Input((5,)), layers.Dense(6, activation="tanh")])
    twin.add(layers.Dense(4, activation="tanh"))
    twin.add(layers.Dense(2))
    twin.set_weights([to_numpy(w) for w in by_hand.weights if w.name in ("kernel", "bias")])
    x = _inputs(5)
    np.testing.assert_allclose(
        _curvature(gated, x, _squares), _curvature(_gated(twin), x, _squares), rtol=1e-5
    )


def test_a_channel_has_the_curvature_of_its_features_that_are_open():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6, 2))
    x = layers.Conv1D(3, 3, activation="tanh", name="conv")(inputs)
    net = keras.Model(inputs, layers.Dense(2)(layers.Flatten(name="flatten")(x)))
    gated = GatedNetwork(insert_gates(net, prune_features=True))
    open_features = np.random.default_rng(0).integers(0, 2, 12)
    _switched(gated, np.concatenate([np.ones(3), open_features]))
    found = _curvature(gated, _inputs(6, 2), _squares)
    of_features = (open_features * found[3:]).reshape(4, 3)  # positions, channels
    np.testing.assert_allclose(found[:3], of_features.sum(axis=0), rtol=1e-4)
    assert (found[3:] > 0).all()
