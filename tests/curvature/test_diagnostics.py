"""Spectrum, density and trace against the dense matrix."""

from __future__ import annotations

import weakref

import keras
import numpy as np
import pytest
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.curvature.diagnostics import (
    CurvatureOperator,
    hessian_density,
    hessian_spectrum,
    hessian_trace,
)
from tf_kfacprune.errors import InvalidArgumentError, NonFiniteError

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_case(activation="tanh"):
    rng = np.random.default_rng(0)
    inputs = keras.Input((4,), dtype="float64")
    hidden = layers.Dense(6, activation=activation, dtype="float64")(inputs)
    model = keras.Model(inputs, layers.Dense(3, dtype="float64")(hidden))
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape))
    return model, (rng.normal(size=(20, 4)), rng.integers(0, 3, 20))


def dense_matrix(model, data, **options) -> np.ndarray:
    operator = CurvatureOperator(model, data, LOSS, **options)
    return np.array([operator.matvec(unit) for unit in np.eye(operator.dimension)])


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_spectrum_equals_the_largest_dense_eigenvalues(curvature):
    model, data = small_case()
    record = hessian_spectrum(model, data, LOSS, k=4, curvature=curvature, tolerance=1e-9)
    expected = np.linalg.eigvalsh(dense_matrix(model, data, curvature=curvature))[::-1][:4]
    np.testing.assert_allclose(record.eigenvalues, expected, rtol=1e-9)
    assert record.top == record.eigenvalues[0]
    assert record.converged
    assert (record.num_parameters, record.num_examples) == (51, 20)


def test_weight_norm_is_recorded():
    model, data = small_case()
    flat = np.concatenate([w.numpy().ravel() for w in model.weights])
    assert hessian_spectrum(model, data, LOSS).weight_norm == pytest.approx(np.linalg.norm(flat))


def test_norm_scaling_is_blind_to_rescaled_layers_and_the_plain_value_is_not():
    model, data = small_case("relu")
    before = {s: hessian_spectrum(model, data, LOSS, scaling=s).top for s in (None, "norm")}
    first, second = model.layers[1:]
    first.set_weights([10.0 * w for w in first.get_weights()])
    second.kernel.assign(second.kernel / 10.0)
    after = {s: hessian_spectrum(model, data, LOSS, scaling=s).top for s in (None, "norm")}
    assert after["norm"] == pytest.approx(before["norm"], rel=1e-6)
    assert after[None] > 10 * before[None]


def test_unconverged_is_said():
    model, data = small_case()
    record = hessian_spectrum(model, data, LOSS, max_steps=2, tolerance=1e-12)
    assert not record.converged
    assert record.steps == 2


def test_trace_lies_within_its_standard_error():
    model, data = small_case()
    matrix = dense_matrix(model, data)
    estimate = hessian_trace(model, data, LOSS, probes=64)
    assert abs(estimate.trace - np.trace(matrix)) <= 4 * estimate.standard_error
    # Hutchinson 1989: the variance of one probe is 2 |H|_F^2 off the diagonal
    off_diagonal = matrix - np.diag(np.diag(matrix))
    expected = np.sqrt(2.0 / 64) * np.linalg.norm(off_diagonal)
    assert estimate.standard_error == pytest.approx(expected, rel=0.3)


def test_density_spans_the_dense_spectrum():
    model, data = small_case()
    eigenvalues = np.linalg.eigvalsh(dense_matrix(model, data))
    density = hessian_density(model, data, LOSS, steps=51, probes=2)
    assert density.nodes[-1] == pytest.approx(eigenvalues[-1], rel=1e-9)
    assert density.nodes[0] == pytest.approx(eigenvalues[0], rel=1e-9)
    assert density.weights.sum() == pytest.approx(1.0)


class CountedArray:
    """An array that knows how many examples of it are held by others."""

    def __init__(self, array):
        self.array = array
        self.held = self.most_held = 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, part):
        piece = self.array[part].copy()
        self.held += len(piece)
        self.most_held = max(self.most_held, self.held)
        weakref.finalize(piece, self._let_go, len(piece))
        return piece

    def _let_go(self, count):
        self.held -= count


@pytest.mark.parametrize("count", [64, 256])
def test_no_more_than_two_batches_are_in_memory_however_many_data_there_are(count):
    model, _ = small_case()
    rng = np.random.default_rng(0)
    x = CountedArray(rng.normal(size=(count, 4)))
    y = CountedArray(rng.integers(0, 3, count))
    hessian_spectrum(model, (x, y), LOSS, batch_size=8, max_steps=3)
    kp.diagnostics.spectral_radius(model, (x, y), LOSS, batch_size=8)
    assert 8 <= x.most_held <= 16
    assert 8 <= y.most_held <= 16


def test_non_finite_parameters_are_an_error():
    model, data = small_case()
    model.layers[1].bias.assign(np.full(6, np.nan))
    with pytest.raises(NonFiniteError, match="Check the parameters"):
        hessian_spectrum(model, data, LOSS)


def test_numbers_out_of_range_are_named():
    model, data = small_case()
    with pytest.raises(InvalidArgumentError, match="probes"):
        hessian_trace(model, data, LOSS, probes=1)
    with pytest.raises(InvalidArgumentError, match="k must be"):
        hessian_spectrum(model, data, LOSS, k=0)


def test_a_prunable_model_is_measured_with_its_gates_as_constants():
    model, data = small_case()
    plain = hessian_spectrum(model, data, LOSS)
    pm = kp.PrunableModel(model, budget=kp.Budget(macs=0.5))
    held_open = hessian_spectrum(pm, data, LOSS)
    assert held_open.num_parameters == plain.num_parameters
    assert held_open.top == pytest.approx(plain.top, rel=1e-6)  # gates are float32
