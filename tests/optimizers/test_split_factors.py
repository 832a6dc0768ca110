"""A large factor cut into diagonal blocks, against the dense block-diagonal matrix in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.curvature import blocks_of
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.optimizers.preconditioners import PRECONDITIONERS, refreshed

to_numpy = keras.ops.convert_to_numpy
N_A, N_OUT, CAP, DAMPING = 8, 5, 3, 0.2
SIZES_A, SIZES_G = [3, 3, 2], [3, 2]


def _state(inverse, cap=CAP):
    layer = keras.layers.Dense(N_OUT)
    layer.build((None, N_A - 1))
    block = blocks_of(layer).blocks[0]

    def add_variable(shape, initializer, dtype, name):
        return keras.Variable(initializer, shape=shape, dtype=dtype, name=name)

    index_of = {id(v): i for i, v in enumerate(block.variables)}
    return PRECONDITIONERS[inverse](block, index_of, add_variable, cap, "split")


def _moment(n, seed):
    root = np.random.default_rng(seed).normal(size=(3 * n, n))
    return root.T @ root / (3 * n)


def _cut(matrix, sizes):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(owner[:, None] == owner, matrix, 0.0)


def _filled(state):
    a, g = _moment(N_A, 0), _moment(N_OUT, 1)
    parts = [
        *state.a.parts_of(tf.constant(a, tf.float32)),
        *state.g.parts_of(tf.constant(g, tf.float32)),
    ]
    averages = [*state.a.averages, *state.g.averages]
    for variable, part in zip(averages, parts, strict=True):
        variable.assign(part)
    new = refreshed([state], 1.0, tf.constant(DAMPING))
    for variable, value in zip(state.inverting, new, strict=True):
        variable.assign(value)
    return _cut(a, SIZES_A), _cut(g, SIZES_G)


def test_blocks_are_as_few_and_as_equal_as_the_cap_allows():
    state = _state("cholesky")
    assert state.a.sizes == SIZES_A
    assert state.g.sizes == SIZES_G
    assert state.capped == ["A", "G"]


def test_cholesky_preconditions_with_the_inverse_of_the_blocks():
    state = _state("cholesky")
    a, g = _filled(state)
    v = np.random.default_rng(2).normal(size=(N_A, N_OUT))
    pi = np.sqrt((np.trace(a) / N_A) / (np.trace(g) / N_OUT))
    left = np.linalg.inv(a + pi * np.sqrt(DAMPING) * np.eye(N_A))
    right = np.linalg.inv(g + np.sqrt(DAMPING) / pi * np.eye(N_OUT))
    got = state.precondition(tf.constant(v, tf.float32), DAMPING)
    np.testing.assert_allclose(to_numpy(got), left @ v @ right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inverse", ["eigen", "ekfac"])
def test_eigenbases_precondition_with_the_blocks_and_exact_damping(inverse):
    """Without new moments EKFAC is K-FAC in its eigenbasis."""
    state = _state(inverse)
    a, g = _filled(state)
    v = np.random.default_rng(2).normal(size=(N_A, N_OUT))
    dense = np.kron(a, g) + DAMPING * np.eye(N_A * N_OUT)
    expected = np.linalg.solve(dense, v.ravel()).reshape(N_A, N_OUT)
    got = state.precondition(tf.constant(v, tf.float32), DAMPING)
    np.testing.assert_allclose(to_numpy(got), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_the_traces_are_those_of_the_whole_factors(inverse):
    state = _state(inverse)
    fisher = np.kron(*_filled(state))
    expected = np.trace(fisher), np.trace(fisher @ fisher)
    assert [float(trace) for trace in state.traces(1.0)] == pytest.approx(expected, rel=1e-5)


def test_rows_are_rotated_block_by_block():
    state = _state("ekfac")
    _filled(state)
    rows = np.random.default_rng(3).normal(size=(2, 4, N_A)).astype("float32")
    basis = np.zeros((N_A, N_A))
    ends = np.cumsum(SIZES_A)
    for end, size, part in zip(ends, SIZES_A, state.a.vectors, strict=True):
        basis[end - size : end, end - size : end] = to_numpy(part)
    got = to_numpy(state.a.times(state.a.vectors, rows, -1))
    np.testing.assert_allclose(got, rows @ basis, atol=1e-5)


def test_summary_shows_the_blocks():
    layer = keras.layers.Dense(N_OUT)
    layer.build((None, N_A - 1))
    block = blocks_of(layer).blocks[0]
    optimizer = KFAC(max_factor_dim=CAP, large_factors="split")
    optimizer.bind([block])
    optimizer.build(block.variables)
    lines = []
    optimizer.summary(lines.append)
    assert "A 3 blocks of up to 3x3, G 2 blocks of up to 3x3" in lines[1]
    assert "above max_factor_dim: A, G" in lines[1]
