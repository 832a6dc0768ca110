"""Layers that are used twice, and locations behind a mask: factors, radius and its gradient."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import (
    Batch,
    CompiledObjective,
    CurvatureEstimator,
    energy_of_gradients,
    energy_of_inputs,
    find_blocks,
)

B, D = 6, 2
WEIGHTS = np.array([2.0, 0.0, 1.0, 0.5, 3.0, 1.5], "float32")
L = keras.layers


class Twins:
    """`f = tanh([x; 1] W) V + tanh([y; 1] W) U` with squared loss, in NumPy and in Keras."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.w, self.v, self.u = (rng.normal(size=s) for s in [(5, 3), (3, D), (3, D)])
        self.x = [rng.normal(size=(B, 4)).astype("float32") for _ in range(2)]

    def network(self):
        inputs = [keras.Input((4,)), keras.Input((4,))]
        shared = L.Dense(3, activation="tanh", name="shared")
        heads = [L.Dense(D, use_bias=False, name=name) for name in ("first", "second")]
        parts = [head(shared(i)) for head, i in zip(heads, inputs, strict=True)]
        model = keras.Model(inputs, L.Add()(parts))
        shared.set_weights([self.w[:-1], self.w[-1]])
        for head, kernel in zip(heads, (self.v, self.u), strict=True):
            head.set_weights([kernel])
        model.compile("sgd", "mse")
        return model

    def factors(self, w, weights):
        a, g = 0.0, 0.0
        for x, kernel in zip(self.x, (self.v, self.u), strict=True):
            rows = np.hstack([x.astype("float64"), np.ones((B, 1))])
            slopes = 1 - np.tanh(rows @ w) ** 2
            a = a + np.einsum("b,bi,bj->ij", weights, rows, rows) / weights.sum()
            # 2/D I is the Hessian of the loss by f; uses are averaged.
            h = np.einsum("b,bi,id,jd,bj->ij", weights, slopes, kernel, kernel, slopes) / B
            g = g + 2 / D * h / 2
        return a, g

    def radius(self, w, weights):
        return np.prod([np.linalg.eigvalsh(m)[-1] for m in self.factors(w, weights)])


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weights"])
def test_a_shared_layer_has_the_sum_of_moments_of_inputs_and_the_mean_of_gradients(weights):
    twins = Twins()
    model = twins.network()
    block = find_blocks(model).blocks[0]
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    batch = Batch(twins.x, np.zeros((B, D), "float32"), weights)
    look = estimator.look(batch, [block], "exact", training=True)
    found = block.factors(look.of(block.layer))
    expected = twins.factors(twins.w, np.ones(B) if weights is None else weights)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(got), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weights"])
def test_its_radius_is_a_product_of_sums_whose_gradient_is_that_of_the_expectation(
    weights, expected_looks
):
    twins = Twins()
    model = twins.network()
    block = find_blocks(model).blocks[0]
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    batch = Batch(twins.x, np.zeros((B, D), "float32"), weights)
    of_examples = np.ones(B) if weights is None else weights
    tops = [np.linalg.eigh(m)[1][:, -1] for m in twins.factors(twins.w, of_examples)]
    u, v = (tf.constant(top, tf.float32) for top in tops)
    with tf.GradientTape() as tape:
        looks = expected_looks(estimator, batch, [block], [D])
        uses = [look.of(block.layer) for look in looks]
        energies = [energy_of_inputs(block, k, u) * energy_of_gradients(block, k, v) for k in uses]
        radius = tf.reduce_sum(energies)
    gradient = tape.gradient(radius, [variable.value for variable in block.variables])
    assert float(radius) == pytest.approx(twins.radius(twins.w, of_examples), rel=2e-5)
    step = 1e-5
    expected = np.zeros_like(twins.w)
    for place in np.ndindex(expected.shape):
        unit = np.zeros_like(twins.w)
        unit[place] = step
        ahead, behind = (twins.radius(twins.w + s * unit, of_examples) for s in (1, -1))
        expected[place] = (ahead - behind) / (2 * step)
    got = np.array(block.to_matrix(gradient))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_uses_on_few_and_on_many_locations_count_by_their_locations():
    """The head of a pyramid: G is the mean over all locations, not over the uses."""
    sequence, vector = keras.Input((7, 4)), keras.Input((4,))
    shared = L.Dense(3, use_bias=False, name="shared")
    many = L.Flatten()(L.Rescaling(0.1)(shared(sequence)))
    few = L.Dense(D, use_bias=False, name="few")(shared(vector))
    model = keras.Model([sequence, vector], [many, few])
    model.compile("sgd", ["mse", "mse"])
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(B, *i.shape[1:])).astype("float32") for i in model.inputs]
    y = [np.zeros((B, 21), "float32"), np.zeros((B, D), "float32")]
    block = next(b for b in find_blocks(model).blocks if b.layer is shared)
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    look = estimator.look(Batch(x, y), [block], "exact", training=True)
    uses = look.of(shared)
    kernel = np.array(model.get_layer("few").kernel).astype("float64")
    expected = (7 * 2 / 21 * 0.01 * np.eye(3) + 2 / D * kernel @ kernel.T) / 8
    np.testing.assert_allclose(np.array(block.factors(uses)[1]), expected, rtol=1e-5, atol=1e-7)
    v = rng.normal(size=3)
    energy = energy_of_gradients(block, uses, tf.constant(v, tf.float32))
    np.testing.assert_allclose(np.array(energy), [v @ expected @ v], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_what_a_layer_without_masks_reads_behind_one_counts():
    """Flatten drops the mask of the tokens, so that token 0 is one like any other."""
    inputs = keras.Input((4,), dtype="int32")
    x = L.Flatten()(L.Embedding(5, 2, mask_zero=True, name="tokens")(inputs))
    model = keras.Model(inputs, L.Dense(2, use_bias=False, name="head")(x))
    model.compile("sgd", "mse")
    tokens = np.array([[0, 1, 0, 2], [0, 0, 3, 0], [4, 0, 1, 0]])
    block = find_blocks(model).blocks[0]
    estimator = CurvatureEstimator(model, CompiledObjective(model))
    look = estimator.look(Batch(tokens, np.zeros((3, 2))), [block], "exact", training=True)
    a, g = block.factors(look.of(block.layer))
    np.testing.assert_allclose(np.array(a), np.bincount(tokens.ravel()) / 3, rtol=1e-6)
    kernel = np.array(model.get_layer("head").kernel).reshape(4, 2, 2)
    expected = np.einsum("tio,tjo->ij", kernel, kernel) / 4
    np.testing.assert_allclose(np.array(g), expected, rtol=1e-5)


LENGTH, PADDED = 3, 7


def _tagger(length, has_attention):
    """Layers of Keras that hand masks on; the projections of attention are EinsumDense layers."""
    inputs = x = keras.Input((length,), dtype="int32")
    x = L.Embedding(9, 4, mask_zero=True, name="tokens")(x)
    x = L.Dense(5, activation="tanh", name="dense")(x)
    x = L.LayerNormalization(name="norm")(x)
    if has_attention:
        x = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    return keras.Model(inputs, L.Dense(4, name="head")(x))


def _factors(model, x, y):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    blocks = find_blocks(model).blocks
    look = CurvatureEstimator(model, CompiledObjective(model)).look(
        Batch(x, y), blocks, "data", training=True
    )
    return {
        block.name: [np.array(factor) for factor in block.factors(look.of(block.layer))]
        for block in blocks
    }


@pytest.mark.parametrize("has_attention", [False, True], ids=["plain", "attention"])
def test_padding_changes_no_factor_of_any_layer(has_attention):
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 9, (B, LENGTH)), rng.integers(0, 4, (B, LENGTH))
    short, long = (_tagger(length, has_attention) for length in (LENGTH, PADDED))
    long.set_weights(short.get_weights())
    pad = ((0, 0), (0, PADDED - LENGTH))
    expected = _factors(short, x, y)
    found = _factors(long, np.pad(x, pad), np.pad(y, pad))
    assert len(found) == (8 if has_attention else 4)
    wrong = [
        f"{name} {kind}"
        for name, pair in expected.items()
        for kind, wanted, got in zip("AG", pair, found[name], strict=True)
        if not np.allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    ]
    assert not wrong
