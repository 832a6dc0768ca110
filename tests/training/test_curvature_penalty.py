"""Spectral radius and its gradient against dense factors in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import (
    Batch,
    CurvatureEstimator,
    SingleObjective,
    SpectralRadius,
    capture,
    find_blocks,
)
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty

to_numpy = keras.ops.convert_to_numpy
BATCH = 12
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _network():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Conv2D(3, 3, activation="tanh", bias_initializer="random_normal")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    model.layers[2].moving_mean.assign([0.1, -0.1, 0.2])
    return model


def _data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(BATCH, 6, 6, 1)).astype("float32"), np.arange(BATCH) % 4


def _contractions(model):
    return [block for block in find_blocks(model).blocks if block.is_contraction]


def _estimator(model):
    return CurvatureEstimator(model, SingleObjective(LOSS), keras.random.SeedGenerator(0))


def _evaluated(penalty, model, x, y, variables=None, estimator=None):
    estimator = estimator or _estimator(model)
    variables = model.trainable_variables if variables is None else variables
    return penalty.gradients(Batch(x, y), estimator, variables)


def _converged_gradients(penalty, model, x, y):
    """Gradients after enough steps for the eigenvectors to converge."""
    estimator = _estimator(model)
    step = tf.function(lambda: _evaluated(penalty, model, x, y, estimator=estimator))
    for _ in range(250):
        gradients = step()
    return gradients


def _penalty(model, **settings):
    settings = {"labels": "data", "every": 1, "batch_fraction": 1.0, **settings}
    return CurvaturePenalty(SpectralRadius(**settings), find_blocks(model).blocks)


def _dense_radii(model, x, y):
    """lambda_max(A) lambda_max(G) of each block with labels of the data, in float64 NumPy."""
    conv, norm, dense = model.layers[1], model.layers[2], model.layers[4]
    kernel, bias = (to_numpy(v).astype("float64") for v in (conv.kernel, conv.bias))
    patches = np.array(
        [[x[:, i : i + 3, j : j + 3, 0].reshape(BATCH, 9) for j in range(4)] for i in range(4)],
        "float64",
    )
    patches = patches.reshape(16, BATCH, 9).swapaxes(0, 1)  # (batch, T, 9)
    h = np.tanh(patches @ kernel.reshape(9, 3) + bias)
    gamma, beta = (to_numpy(v).astype("float64") for v in (norm.gamma, norm.beta))
    std = np.sqrt(h.var((0, 1)) + norm.epsilon)
    normalized = (h - h.mean((0, 1))) / std
    flat = (gamma * normalized + beta).reshape(BATCH, -1)
    weight, last_bias = (to_numpy(v).astype("float64") for v in (dense.kernel, dense.bias))
    logits = flat @ weight + last_bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g = p - np.eye(4)[y]
    d = (g @ weight.T).reshape(BATCH, 16, 3) * gamma
    # Through the statistics of the batch, as in training.
    d = d - d.mean((0, 1)) - normalized * (d * normalized).mean((0, 1))
    g_conv = d / std * (1 - h**2)
    a_conv = np.concatenate([patches, np.ones((BATCH, 16, 1))], axis=-1)
    a_dense = np.c_[flat, np.ones(BATCH)]
    factors = [
        (np.einsum("bti,btj->ij", a_conv, a_conv) / BATCH, g_conv.reshape(-1, 3)),
        (a_dense.T @ a_dense / BATCH, g),
    ]
    top = [
        (np.linalg.eigvalsh(a)[-1], np.linalg.eigvalsh(r.T @ r / len(r))[-1]) for a, r in factors
    ]
    return [a * g for a, g in top]


def test_capture_is_bit_equal_to_the_model_and_leaves_the_layers_alone():
    model = _network()
    x, _ = _data()
    blocks = _contractions(model)
    activations = [block.layer.activation for block in blocks]
    outputs, records = capture(model, x, blocks, training=False)
    np.testing.assert_array_equal(np.array(outputs), np.array(model(x, training=False)))
    assert [record.layer.name for record in records] == [block.name for block in blocks]
    assert [block.layer.activation for block in blocks] == activations


@pytest.mark.parametrize("reduction", ["max", "sum", "smooth_max"])
def test_the_radius_converges_to_that_of_the_dense_factors(reduction):
    model = _network()
    x, y = _data()
    penalty = _penalty(model, reduction=reduction)
    _converged_gradients(penalty, model, x, y)
    radii = np.array(_dense_radii(model, x, y))
    expected = {"max": radii.max(), "sum": radii.sum(), "smooth_max": np.sum(radii**8) ** (1 / 8)}
    assert float(penalty.radius()) == pytest.approx(expected[reduction], rel=1e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_the_gradient_equals_finite_differences_of_the_dense_radius(relative):
    model = _network()
    x, y = _data()
    penalty = _penalty(model, strength=1.0, relative=relative, reduction="sum")
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]

    def total():
        weights = [np.sum(to_numpy(k) ** 2) if relative else 1.0 for k in kernels]
        return np.dot(weights, _dense_radii(model, x, y))

    gradients = _converged_gradients(penalty, model, x, y)
    rng = np.random.default_rng(3)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        direction = rng.normal(size=variable.shape).astype("float32")
        direction /= np.linalg.norm(direction)
        start, step = to_numpy(variable), 1e-2
        values = []
        for sign in (1, -1):
            variable.assign(start + sign * step * direction)
            values.append(total())
        variable.assign(start)
        expected = (values[0] - values[1]) / (2 * step)
        got = float(np.sum(np.array(gradient) * direction))
        assert got == pytest.approx(expected, rel=2e-2, abs=2e-3), variable.path


def test_relative_radii_are_blind_to_rescaled_inputs_and_layers_and_plain_ones_are_not():
    def scaled_penalty(relative, inputs=1.0, layers=1.0):
        keras.utils.set_random_seed(0)
        first = keras.layers.Dense(5, "relu", use_bias=False)
        second = keras.layers.Dense(3, use_bias=False)
        model = keras.Sequential([keras.Input((4,)), first, second])
        first.kernel.assign(first.kernel * layers / inputs)
        second.kernel.assign(second.kernel / layers)
        x = inputs * np.random.default_rng(0).normal(size=(BATCH, 4)).astype("float32")
        penalty = _penalty(model, strength=1.0, relative=relative)
        kernels = [first.kernel, second.kernel]
        y = np.arange(BATCH) % 3
        gradients = _evaluated(penalty, model, x, y, kernels)
        # along a change of all kernels by the same percentage
        return sum(
            float(tf.reduce_sum(g * to_numpy(k))) for g, k in zip(gradients, kernels, strict=True)
        )

    for changes in ({"inputs": 5.0}, {"layers": 3.0}):
        assert scaled_penalty(True, **changes) == pytest.approx(scaled_penalty(True), rel=1e-4)
        assert scaled_penalty(False, **changes) != pytest.approx(scaled_penalty(False), rel=0.1)


def test_a_batch_that_is_not_finite_leaves_averages_and_directions_alone():
    model = _network()
    x, y = _data()
    penalty = _penalty(model)
    _evaluated(penalty, model, x, y)
    before = [to_numpy(w) for w in penalty.weights]
    x[0, 0, 0] = np.inf
    _evaluated(penalty, model, x, y)
    for old, weight in zip(before, penalty.weights, strict=True):
        np.testing.assert_array_equal(old, to_numpy(weight))


def test_below_the_threshold_there_is_no_gradient():
    model = _network()
    x, y = _data()
    penalty = _penalty(model, threshold=1e6)
    gradients = _evaluated(penalty, model, x, y)
    assert all(not np.any(np.array(g)) for g in gradients)
    assert float(penalty.radius()) > 0


def _added(penalty, model, x, y, *, step=0, of_loss=1e6, scale=1.0):
    """What is added to gradients of the loss that are `of_loss` everywhere."""
    variables = model.trainable_variables
    gradients = [tf.fill(v.shape, of_loss) for v in variables]
    estimator = _estimator(model)
    found = penalty.added(gradients, tf.constant(step), Batch(x, y), estimator, variables, scale)
    return [np.array(f - g, "float64") for f, g in zip(found, gradients, strict=True)]


def test_the_penalty_is_due_every_kth_step_with_weight_k():
    model = _network()
    x, y = _data()
    reference = _evaluated(_penalty(model, strength=10.0), model, x, y)
    penalty = _penalty(model, strength=10.0, every=3)
    for step in range(4):
        added = _added(penalty, model, x, y, step=step, of_loss=1e2)
        assert any(np.any(a) for a in added) == (step in (0, 3))
        if step == 0:
            for a, q in zip(added, reference, strict=True):
                np.testing.assert_allclose(a, 3 * np.array(q), rtol=1e-3, atol=1e-4)


def test_the_penalty_is_never_larger_than_a_share_of_the_loss_gradient():
    model = _network()
    x, y = _data()
    gradients = [np.array(q) for q in _evaluated(_penalty(model, strength=1e6), model, x, y)]
    for scale in (1.0, 8.0):  # a scaled loss has scaled gradients
        penalty = _penalty(model, strength=1e6, every=3)
        added = _added(penalty, model, x, y, of_loss=scale * 1e-3, scale=scale)
        for a, q in zip(added, gradients, strict=True):
            size = 3 * 0.6 * scale * 1e-3 * np.sqrt(q.size)
            np.testing.assert_allclose(a, size * q / np.linalg.norm(q), rtol=1e-3, atol=1e-7)


def test_nothing_is_flattened_below_the_reduction_that_was_asked_for():
    model = _network()
    x, y = _data()
    penalty = _penalty(model, reduction_to=0.5)
    for _ in range(20):  # what the reduction is relative to
        gradients = _evaluated(penalty, model, x, y)
        assert not any(np.any(np.array(g)) for g in gradients)
    assert float(penalty.figures()["radius_reduction"]) == pytest.approx(1.0, rel=0.2)
    assert any(np.any(np.array(g)) for g in _evaluated(penalty, model, x, y))
    penalty.reference.assign(1e9)  # as if it had been so large
    assert not any(np.any(np.array(g)) for g in _evaluated(penalty, model, x, y))
    assert float(penalty.figures()["radius_reduction"]) < 1e-3


def test_the_part_of_a_batch_has_at_least_sixteen_examples():
    model = _network()
    x, y = _data()
    x, y = np.concatenate([x, 2 * x, 3 * x, 4 * x]), np.tile(y, 4)  # 48, of which 5 are a tenth
    expected = _evaluated(_penalty(model), model, x[:16], y[:16])
    penalty = _penalty(model, batch_fraction=0.1)
    added = _added(penalty, model, x, y, of_loss=1.0)
    for a, q in zip(added, expected, strict=True):
        np.testing.assert_allclose(a, np.array(q), rtol=1e-2, atol=1e-6)


class _Shared:
    """Logits of a Dense layer W that is used twice: `tanh(tanh(x W) W) V`, in float64 NumPy.

    Its factors are those of the true Fisher of softmax, of all labels, not of drawn ones.
    """

    def __init__(self):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((3,))
        shared = keras.layers.Dense(3, "tanh", use_bias=False)
        last = keras.layers.Dense(2, use_bias=False)
        self.model = keras.Model(inputs, last(shared(shared(inputs))))
        self.x = np.random.default_rng(0).normal(size=(BATCH, 3)).astype("float32")
        self.y = np.arange(BATCH) % 2

    def radii(self, w, v):
        """lambda_max of the sums over uses of A, and of the means over uses of G."""
        x = self.x.astype("float64")
        first = np.tanh(x @ w)
        second = np.tanh(first @ w)
        p = np.exp(second @ v)
        p /= p.sum(1, keepdims=True)
        fisher = p[:, :, None] * np.eye(2) - p[:, :, None] * p[:, None, :]

        def back(matrix, weights, slope):
            jacobian = weights.T[None] * slope[:, None, :]  # (batch, out, in)
            return np.einsum("bji,bjk,bkl->bil", jacobian, matrix, jacobian)

        g_second = back(fisher, v, 1 - second**2)
        g_first = back(g_second, w, 1 - first**2)
        a_shared = (x.T @ x + first.T @ first) / BATCH
        g_shared = 0.5 * (g_first.mean(0) + g_second.mean(0))
        pairs = [(a_shared, g_shared), (second.T @ second / BATCH, fisher.mean(0))]
        return [np.linalg.eigvalsh(a)[-1] * np.linalg.eigvalsh(g)[-1] for a, g in pairs]

    def differences(self, direction, step=1e-5):
        """Derivative of the sum of the radii along a direction, by central differences."""
        weights = [to_numpy(v).astype("float64") for v in self.model.trainable_variables]
        ends = [
            sum(self.radii(*(w + sign * step * d for w, d in zip(weights, direction, strict=True))))
            for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / (2 * step)


def test_the_default_penalty_has_the_gradient_of_the_fisher_and_sums_over_uses():
    """Labels are drawn: value and gradient are right in the mean over many draws."""
    case = _Shared()
    x, y = np.tile(case.x, (2000, 1)), np.tile(case.y, 2000)
    penalty = _penalty(case.model, strength=1.0, relative=False, labels="sampled")
    gradients = _converged_gradients(penalty, case.model, x, y)
    weights = [to_numpy(v).astype("float64") for v in case.model.trainable_variables]
    expected = sum(case.radii(*weights))
    assert float(penalty.radius()) == pytest.approx(expected, rel=0.02)
    scale = float(np.sqrt(sum(np.sum(np.array(g) ** 2) for g in gradients)))
    rng = np.random.default_rng(3)
    for _ in range(4):
        direction = [rng.normal(size=w.shape) for w in weights]
        norm = np.sqrt(sum(np.sum(d**2) for d in direction))
        direction = [d / norm for d in direction]
        got = sum(np.sum(np.array(g) * d) for g, d in zip(gradients, direction, strict=True))
        assert got == pytest.approx(case.differences(direction), abs=0.05 * scale)


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": -1.0},
        {"relative": 1.0},
        {"threshold": -1.0},
        {"reduction_to": 1.0},
        {"reduction": "mean"},
        {"every": 0},
        {"batch_fraction": 1.5},
        {"labels": "none"},
    ],
    ids=str,
)
def test_bad_settings_are_named(arguments):
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        SpectralRadius(**arguments)
