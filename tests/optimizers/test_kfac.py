"""K-FAC steps against a float64 reference, and the contract of a Keras optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import (
    Batch,
    CurvatureEstimator,
    Record,
    SingleObjective,
    blocks_of,
)
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.training import KFACModel

to_numpy = keras.ops.convert_to_numpy


def _dense(n_in=4, n_out=3, use_bias=True):
    layer = keras.layers.Dense(n_out, use_bias=use_bias)
    layer.build((None, n_in))
    return layer


def _factors(n, seed):
    root = np.random.default_rng(seed).normal(size=(3 * n, n))
    return (root.T @ root / (3 * n)).astype("float32")


class _Reference:
    """K-FAC with momentum for one layer, in float64 NumPy."""

    def __init__(self, damping, momentum, kl_clip, decay):
        self.damping, self.momentum, self.kl_clip, self.decay = damping, momentum, kl_clip, decay
        self.a = self.g = self.m = 0.0
        self.updates = 0

    def update(self, a, g):
        self.a = self.decay * self.a + (1 - self.decay) * a.astype("float64")
        self.g = self.decay * self.g + (1 - self.decay) * g.astype("float64")
        self.updates += 1
        debias = 1 / (1 - self.decay**self.updates)
        a, g = self.a * debias, self.g * debias
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
        self.a_inv = np.linalg.inv(a + pi * np.sqrt(self.damping) * np.eye(len(a)))
        self.g_inv = np.linalg.inv(g + np.sqrt(self.damping) / pi * np.eye(len(g)))

    def step(self, gradient, lr):
        p = self.a_inv @ gradient.astype("float64") @ self.g_inv
        nu = min(1.0, np.sqrt(self.kl_clip / (lr**2 * np.sum(p * gradient)))) if self.kl_clip else 1
        self.m = self.momentum * self.m + lr * nu * p
        return -self.m


@pytest.mark.parametrize("kl_clip", [None, 1e-4])
@pytest.mark.parametrize("use_bias", [True, False])
def test_steps_equal_the_float64_reference(use_bias, kl_clip):
    layer = _dense(use_bias=use_bias)
    block = blocks_of(layer).blocks[0]
    optimizer = KFAC(0.1, momentum=0.8, damping=0.05, kl_clip=kl_clip, factor_decay=0.7)
    optimizer.bind([block])
    optimizer.build(block.variables)
    reference = _Reference(0.05, 0.8, kl_clip, 0.7)
    weights = np.concatenate([to_numpy(v).reshape(-1, 3) for v in block.variables]).astype(
        "float64"
    )
    rng = np.random.default_rng(0)
    for seed in range(4):
        a, g = _factors(block.n_a, seed), _factors(3, 10 + seed)
        optimizer.update_factors([tf.constant(a), tf.constant(g)])
        reference.update(a, g)
        gradient = rng.normal(size=(block.n_a, 3)).astype("float32")
        optimizer.apply(block.from_matrix(tf.constant(gradient)), block.variables)
        weights += reference.step(gradient, 0.1)
    got = np.concatenate([to_numpy(v).reshape(-1, 3) for v in block.variables])
    np.testing.assert_allclose(got, weights, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("every", "early"), [(1, []), (2, [1]), (10, [1, 2, 4]), (16, [1, 2, 4, 8])]
)
def test_factors_are_updated_periodically_and_more_often_at_first(every, early):
    block = blocks_of(_dense()).blocks[0]
    optimizer = KFAC(factor_every=every)
    optimizer.bind([block])
    optimizer.build(block.variables)
    due = []
    for step in range(3 * every):
        optimizer.iterations.assign(step)
        if bool(optimizer.factors_due()):
            due.append(step)
    assert due == sorted({*range(0, 3 * every, every), *early})


def test_the_block_is_the_exact_ggn_of_a_linear_layer_with_squared_loss():
    """A (x) G with G = 2/D I, the output Hessian of the mean squared error, is the dense GGN."""
    rng = np.random.default_rng(0)
    layer = _dense(4, 3)
    block = blocks_of(layer).blocks[0]
    x = rng.normal(size=(6, 4)).astype("float32")
    record = Record(layer, tf.constant(x), layer(x))
    a = np.array(block.factor_a(record, None), "float64")
    kron = np.kron(a, 2 / 3 * np.eye(3))
    homogeneous = np.concatenate([x, np.ones((6, 1))], axis=1).astype("float64")
    target = rng.normal(size=(6, 3))

    def loss(w):
        return np.mean((homogeneous @ w.reshape(5, 3) - target) ** 2)

    w0, step = rng.normal(size=15), 1e-3
    unit = np.eye(15) * step
    dense = np.array(
        [
            [
                loss(w0 + unit[i] + unit[j])
                - loss(w0 + unit[i] - unit[j])
                - loss(w0 - unit[i] + unit[j])
                + loss(w0 - unit[i] - unit[j])
                for j in range(15)
            ]
            for i in range(15)
        ]
    ) / (4 * step**2)
    np.testing.assert_allclose(kron, dense, atol=1e-6)


def test_gradients_of_preactivations_are_per_example_and_sum_to_the_weight_gradient():
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    blocks = [blocks_of(layer).blocks[0] for layer in model.layers[1:]]
    x = np.random.default_rng(0).normal(size=(7, 5)).astype("float32")
    y = np.arange(7) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    estimator = CurvatureEstimator(model, SingleObjective(loss))
    look = estimator.look(Batch(x, y), blocks, "data", training=True)
    records, (g,) = look.records, look.probes
    with tf.GradientTape() as tape:
        value = loss(y, model(x))
    expected = tape.gradient(value, [b.kernel.value for b in blocks])
    for record, g_of_record, gradient in zip(records, g, expected, strict=True):
        summed = tf.einsum("bi,bj->ij", record.x, g_of_record) / 7
        np.testing.assert_allclose(np.array(summed), np.array(gradient), rtol=1e-5, atol=1e-6)


def test_variables_without_a_block_take_the_steps_of_keras_adam():
    ours, theirs = (keras.Variable([1.0, -2.0, 3.0]) for _ in range(2))
    kfac, adam = KFAC(0.1, adam_ratio=0.5), keras.optimizers.Adam(0.05)
    kfac.build([ours])
    rng = np.random.default_rng(0)
    for _ in range(5):
        gradient = tf.constant(rng.normal(size=3).astype("float32"))
        kfac.apply([gradient], [ours])
        adam.apply([gradient], [theirs])
    np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), rtol=1e-5)


def test_factors_with_nan_are_left_out():
    layer = _dense()
    block = blocks_of(layer).blocks[0]
    optimizer = KFAC()
    optimizer.bind([block])
    optimizer.build(block.variables)
    optimizer.update_factors([tf.constant(_factors(5, 0)), tf.constant(_factors(3, 1))])
    before = [to_numpy(v) for v in optimizer.variables]
    poisoned = _factors(5, 2)
    poisoned[0, 0] = np.nan
    optimizer.update_factors([tf.constant(poisoned), tf.constant(_factors(3, 3))])
    for old, new in zip(before, optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(new), old)


def test_inverses_follow_their_own_period_after_the_first_steps():
    layer = _dense()
    block = blocks_of(layer).blocks[0]
    optimizer = KFAC(1e-6, factor_every=1, inverse_every=3)
    optimizer.bind([block])
    optimizer.build(block.variables)
    changed = []
    for step in range(8):
        (inverse,) = [v for v in optimizer.variables if v.path.endswith("a_inverse")]
        before = to_numpy(inverse)
        optimizer.update_factors([tf.constant(_factors(5, step)), tf.constant(_factors(3, step))])
        changed.append(not np.array_equal(before, to_numpy(inverse)))
        optimizer.apply([tf.zeros(v.shape) for v in block.variables], block.variables)
    assert changed == [True, True, True, True, False, False, True, False]


def test_config_round_trips():
    optimizer = KFAC(
        0.02, damping=0.1, kl_clip=None, labels="data", weight_decay=1e-4, clipnorm=1.0
    )
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    assert isinstance(again, KFAC)
    assert again.get_config() == optimizer.get_config()


def test_summary_lists_blocks_memory_and_the_rest_with_a_reason():
    layer, free = _dense(4, 3), keras.Variable(np.zeros(7, "float32"), name="free")
    block = blocks_of(layer).blocks[0]
    optimizer = KFAC()
    optimizer.bind([block])
    optimizer.build([*block.variables, free])
    lines = []
    optimizer.summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert "A 5x5, G 3x3" in text
    assert "free" in text
    assert "7 parameters" in text
    assert "not a kernel or bias" in text


def test_summary_gives_the_reason_of_each_variable():
    inputs = keras.Input((8, 4))
    recurrent = keras.layers.LSTM(4, name="recurrent")  # whose cell is numbered by Keras
    x = keras.layers.BatchNormalization(name="norm", axis=1)(recurrent(inputs))
    x = keras.layers.GroupNormalization(2, name="groups")(x)
    model = KFACModel(keras.Model(inputs, keras.layers.Dense(2)(x)))
    optimizer = KFAC()
    model.compile(optimizer, "mse")
    lines = []
    optimizer.summary(print_fn=lines.append)
    by_variable = {line.split()[0]: line for line in lines if "parameters" in line}
    assert "(LSTM)" in by_variable[recurrent.cell.kernel.path]
    assert "(GroupNormalization)" in by_variable["groups/gamma"]


def test_summary_says_so_when_no_model_hands_factors_over():
    optimizer = KFAC()
    optimizer.build([keras.Variable([1.0])])
    lines = []
    optimizer.summary(print_fn=lines.append)
    assert "does not hand Kronecker factors" in "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "damping=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"kl_clip": -1.0}, "kl_clip=-1.0"),
        ({"factor_every": 0}, "factor_every=0"),
        ({"inverse_every": 2.5}, "inverse_every=2.5"),
        ({"batch_fraction": 0.0}, "batch_fraction=0.0"),
        ({"location_fraction": 0.0}, "location_fraction=0.0"),
        ({"location_fraction": 0.5, "weight_sharing": "reduce"}, "location_fraction=0.5"),
        ({"labels": "true"}, "labels='true'"),
        ({"adam_ratio": 0}, "adam_ratio=0"),
        ({"norm_constraint": 0.0}, "norm_constraint=0.0"),
        ({"learning_rate": "adaptive"}, "learning_rate='adaptive'"),
        ({"inverse": "lu"}, "inverse='lu'"),
        ({"weight_sharing": "mean"}, "weight_sharing='mean'"),
        ({"max_factor_dim": 0}, "max_factor_dim=0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        KFAC(**arguments)


def test_an_optimizer_serves_one_model():
    first, second = blocks_of(_dense()).blocks[0], blocks_of(_dense()).blocks[0]
    optimizer = KFAC()
    optimizer.bind([first])
    optimizer.build(first.variables)
    optimizer.bind([first])
    with pytest.raises(InvalidArgumentError, match="optimizer of its own"):
        optimizer.bind([second])
