"""Averaged curvature against dense matrices in float64: inverses, products, moments, mixing."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import Batch, CompiledObjective, CurvatureEstimator, find_blocks
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.optimizers.factors import by_size, decomposed, inverted

to_numpy = keras.ops.convert_to_numpy
B = 6
WEIGHTS = np.array([2.0, 0.0, 1.0, 0.5, 3.0, 1.5], "float32")


def _moment(*shape, seed=0):
    *leading, n = shape
    root = np.random.default_rng(seed).normal(size=(*leading, 3 * n, n))
    return np.swapaxes(root, -1, -2) @ root / (3 * n)


def test_matrices_of_many_sizes_and_groups_are_inverted_as_one_by_one():
    shapes = [(3,), (2, 4), (4,), (5, 3), (1, 4)]
    matrices = [_moment(*shape, seed=k) for k, shape in enumerate(shapes)]
    dampings = [np.random.default_rng(k).uniform(0.1, 1, s[:-1]) for k, s in enumerate(shapes)]
    tensors = [tf.constant(m, tf.float32) for m in matrices]
    found = by_size(inverted, tensors, [tf.constant(d, tf.float32) for d in dampings])
    for (got,), m, d in zip(found, matrices, dampings, strict=True):
        expected = np.linalg.inv(m + d[..., None, None] * np.eye(m.shape[-1]))
        np.testing.assert_allclose(to_numpy(got), expected, rtol=1e-4, atol=1e-4)
    for (values, vectors), m in zip(by_size(decomposed, tensors), matrices, strict=True):
        np.testing.assert_allclose(to_numpy(values), np.linalg.eigvalsh(m), rtol=1e-4, atol=1e-5)
        q = to_numpy(vectors)
        again = (q * to_numpy(values)[..., None, :]) @ np.swapaxes(q, -1, -2)
        np.testing.assert_allclose(again, m, rtol=1e-4, atol=1e-5)


def _network():
    inputs = x = keras.Input((4,))
    x = keras.layers.Dense(3, activation="tanh", name="hidden")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    model.compile("sgd", "mse")
    return model


def _optimizer(model, **settings):
    blocks = find_blocks(model).blocks
    optimizer = KFAC(**{"batch_fraction": 1.0, **settings})
    optimizer.bind(blocks)
    optimizer.build(model.trainable_variables)
    return optimizer


def _look(model, optimizer, weights=None):
    x = np.random.default_rng(0).normal(size=(B, 4)).astype("float32")
    batch = Batch(x, np.zeros((B, 2), "float32"), weights)
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    return estimator.look(batch, optimizer.blocks, "exact", training=True)


def _dense(optimizer, debias=1.0):
    """The block-diagonal curvature, in the order of the blocks' matrices."""
    blocks = []
    for state in optimizer._curvature.states:
        a, g = (to_numpy(f.averages[0]).astype("float64") * debias for f in (state.a, state.g))
        pairs = [(a, g)] if a.ndim == 2 else zip(a, g, strict=True)
        blocks += [np.kron(*pair) for pair in pairs]
    size = sum(len(b) for b in blocks)
    whole, start = np.zeros((size, size)), 0
    for b in blocks:
        whole[start : start + len(b), start : start + len(b)] = b
        start += len(b)
    return whole


def _flat(optimizer, direction):
    found, start = [], 0
    for state in optimizer._curvature.states:
        end = start + len(state.indices)
        found.append(to_numpy(state.block.to_matrix(direction[start:end])).ravel())
        start = end
    return np.concatenate(found).astype("float64")


def _directions(optimizer, count=2):
    rng = np.random.default_rng(1)
    shapes = [v.shape for v in optimizer.block_variables]
    return [[tf.constant(rng.normal(size=s), tf.float32) for s in shapes] for _ in range(count)]


def test_products_with_the_average_are_those_of_the_dense_matrix():
    model = _network()
    optimizer = _optimizer(model, factor_decay=0.6)
    optimizer.update_factors(optimizer.statistics(_look(model, optimizer)))
    directions = _directions(optimizer)
    flat = np.stack([_flat(optimizer, d) for d in directions])
    expected = flat @ _dense(optimizer, 1 / 0.4) @ flat.T
    np.testing.assert_allclose(optimizer._curvature.form(directions), expected, rtol=1e-4)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weights"])
def test_moments_are_the_squares_of_the_examples_gradients_in_the_eigenbasis(weights):
    model = _network()
    optimizer = _optimizer(model, inverse="ekfac")
    optimizer.update_factors(optimizer.statistics(_look(model, optimizer, weights)))
    look = _look(model, optimizer, weights)
    state = optimizer._curvature.states[-1]
    moments = to_numpy(state.statistics(look)[-1])
    uses = look.of(state.block.layer)
    rows = to_numpy(uses.records[0].x).astype("float64")
    rows = np.hstack([rows, np.ones((B, 1))]) @ to_numpy(state.a.vectors[0])
    # sqrt(2 w / D) times a unit vector is the gradient of one output's probe.
    scale = 2.0 / 2 * (np.ones(B) if weights is None else weights)
    basis = to_numpy(state.g.vectors[0]).astype("float64")
    expected = np.einsum("b,bi,dj->ij", scale, rows**2, basis**2) / B
    np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_small", [False, True])
def test_a_small_batch_stands_for_a_large_one_of_average_curvature(is_small):
    """K = share K_batch + (1 - share) K_average + damping, b = share b_batch."""
    model = _network()
    optimizer = _optimizer(model, learning_rate="auto", factor_decay=0.0)
    optimizer.update_factors(optimizer.statistics(_look(model, optimizer)))
    directions, (gradients,) = _directions(optimizer), _directions(optimizer, 1)
    of_batch = np.array([[5.0, 1.0], [1.0, 7.0]], "float32")
    sizes = [64.0, 16.0] if is_small else [64.0, 64.0]
    for size in sizes:
        with optimizer.measured_by(lambda _, n=size: (tf.constant(of_batch), tf.constant(n))):
            quadratic = optimizer._quadratic_model(gradients, directions)
    flat = np.stack([_flat(optimizer, d) for d in directions])
    share = sizes[1] / 64
    expected = share * of_batch + (1 - share) * flat @ _dense(optimizer) @ flat.T
    expected = expected + float(optimizer.current_damping) * flat @ flat.T
    np.testing.assert_allclose(np.array(quadratic.k), expected, rtol=1e-4)
    of_loss = share * flat @ _flat(optimizer, gradients)
    np.testing.assert_allclose(np.array(quadratic.b), of_loss, rtol=1e-4)
    # Below half of the largest the step to come, number 0, is judged before number 1.
    optimizer.adaptive_damping._watched_until.assign(0)
    with optimizer.measured_by(lambda _: (tf.constant(of_batch), tf.constant(sizes[1]))):
        optimizer._quadratic_model(gradients, directions)
    assert int(optimizer.adaptive_damping._watched_until) == (1 if is_small else 0)


def test_a_step_is_judged_once():
    model = _network()
    damping = _optimizer(model, learning_rate="auto").adaptive_damping
    step = tf.constant(1, tf.int64)
    assert bool(damping.is_due(step))
    damping.expect(tf.constant(-1.0))
    before = float(damping.value)
    damping.judge(tf.constant(2.0), step)
    assert bool(damping.is_rejected)
    assert float(damping.value) == pytest.approx(3 * before)
    # A step whose gradients overflow leaves the count of steps as it is.
    assert not bool(damping.is_due(step))
    assert not bool(damping.is_due(step, at_once=tf.constant(True)))
    damping.keep()
    assert not bool(damping.is_rejected)
    assert bool(damping.is_due(step + 1))


@pytest.mark.parametrize("learning_rate", [0.01, "auto"])
def test_variables_of_adam_decay_at_their_own_rate(learning_rate):
    """The same with and without "auto": its Adam steps are those of a rate of 0.01."""
    model = _network()
    free = keras.Variable(np.full(3, 2.0, "float32"), name="free")
    optimizer = KFAC(learning_rate, weight_decay=0.5, adam_ratio=0.2)
    optimizer.bind(find_blocks(model).blocks)
    optimizer.build([*model.trainable_variables, free])
    optimizer._apply_weight_decay([free])
    np.testing.assert_allclose(to_numpy(free), np.full(3, 2.0 * (1 - 0.5 * 0.2 * 0.01)), rtol=1e-7)
