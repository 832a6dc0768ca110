"""How flat a minimum is: exact eigenvalues, spectral density and trace of the curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_kfacprune.curvature.hessian import CurvatureOperator
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.linalg import SpectralDensity, lanczos_top, spectral_density

__all__ = [
    "CurvatureOperator",
    "HessianSpectrum",
    "TraceEstimate",
    "hessian_density",
    "hessian_spectrum",
    "hessian_trace",
]


@dataclass(frozen=True)
class HessianSpectrum:
    """Largest eigenvalues of the curvature of a model's mean loss.

    Attributes:
        eigenvalues: The k largest, in descending order, shape (k,); fewer if some are repeated, for
            each counts once.
        residuals: ``|H v - theta v|`` for each: a true eigenvalue lies this close.
        converged: Whether all residuals are within the tolerance.
        steps: Number of passes over the data.
        curvature: ``"hessian"`` or ``"ggn"``.
        scaling: None, or ``"norm"`` (see `CurvatureOperator`).
        num_parameters: Size of the matrix.
        num_examples: Number of examples in the data.
        weight_norm: Euclidean norm of the parameters; unscaled eigenvalues are comparable only
            between equal architectures at similar norms.
    """

    eigenvalues: NDArray[np.float64]
    residuals: NDArray[np.float64]
    converged: bool
    steps: int
    curvature: str
    scaling: str | None
    num_parameters: int
    num_examples: int
    weight_norm: float

    @property
    def top(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])


@dataclass(frozen=True)
class TraceEstimate:
    """Stochastic estimate of the trace of the curvature.

    Attributes:
        trace: The estimate.
        standard_error: Its standard error over the probes.
        probes: Number of probes.
    """

    trace: float
    standard_error: float
    probes: int


def hessian_spectrum(
    model: Any,
    data: Any,
    loss: Any,
    *,
    k: int = 1,
    curvature: str = "hessian",
    scaling: str | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 100,
    batch_size: int = 500,
    seed: int = 0,
) -> HessianSpectrum:
    """Computes the largest eigenvalues of the Hessian (or GGN) of the mean loss over a data set.

    Lanczos with exact matrix-vector products; every product is one pass over all the data, in
    inference mode. The model is left as it was.

    Args:
        model: A built `keras.Model` with one output, or a `PrunableModel` (its gates are held at
            their inference values and count as constants).
        data: ``(x, y)`` arrays, or a `tf.data.Dataset` of batches ``(x, y)``.
        loss: As given to `compile`; taken as a mean over examples.
        k: Number of eigenvalues.
        curvature: ``"hessian"`` or ``"ggn"`` (generalized Gauss-Newton; the Fisher for cross
            entropies).
        scaling: None, or ``"norm"``: eigenvalues that do not change when one layer is scaled up
            and the next one down (scale-invariant sharpness).
        tolerance: Residual, relative to the largest of the k eigenvalues, at which to stop.
        max_steps: Largest number of passes over the data, at least k. Memory: this times the number
            of parameters times 8 bytes.
        batch_size: Number of examples per product when ``data`` holds arrays.
        seed: Seed of the start vector.

    Returns:
        A `HessianSpectrum` with ``top`` and ``eigenvalues``.

    Raises:
        InvalidArgumentError: If an argument is out of range.
        UnsupportedModelError: If the model has no trustworthy second derivatives.
        DataError: If the data are empty or malformed.
        NonFiniteError: If a product is not finite.

    Examples:
        >>> import keras, numpy as np
        >>> import tf_kfacprune as kp
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> x, y = np.ones((8, 4), "float32"), np.zeros((8, 1), "float32")
        >>> round(kp.diagnostics.hessian_spectrum(model, (x, y), "mse").top, 4)
        10.0

    References:
        Sandler, Klabjan & Luo 2021; Ghorbani, Krishnan & Xiao 2019, "An Investigation into
        Neural Net Optimization via Hessian Eigenvalue Density".
    """
    operator = CurvatureOperator(
        model, data, loss, curvature=curvature, scaling=scaling, batch_size=batch_size
    )
    pairs = lanczos_top(
        operator.matvec,
        operator.dimension,
        k,
        max_steps=max_steps,
        tolerance=tolerance,
        seed=seed,
    )
    return HessianSpectrum(
        eigenvalues=pairs.eigenvalues,
        residuals=pairs.residuals,
        converged=pairs.converged,
        steps=pairs.steps,
        curvature=curvature,
        scaling=scaling,
        num_parameters=operator.dimension,
        num_examples=operator.num_examples,
        weight_norm=float(np.linalg.norm(operator.parameters)),
    )


def hessian_density(
    model: Any,
    data: Any,
    loss: Any,
    *,
    curvature: str = "hessian",
    steps: int = 80,
    probes: int = 4,
    batch_size: int = 500,
    seed: int = 0,
) -> SpectralDensity:
    """Estimates the distribution of all eigenvalues by stochastic Lanczos quadrature.

    Args:
        model: As in `hessian_spectrum`.
        data: As in `hessian_spectrum`.
        loss: As in `hessian_spectrum`.
        curvature: ``"hessian"`` or ``"ggn"``.
        steps: Lanczos steps per probe, each one pass over the data.
        probes: Number of random start vectors.
        batch_size: Number of examples per product when ``data`` holds arrays.
        seed: Seed of the start vectors.

    Returns:
        A `SpectralDensity`: ``nodes`` and ``weights``, and ``smoothed(grid, width)`` for plots.

    Raises:
        InvalidArgumentError: If an argument is out of range.
        UnsupportedModelError: If the model has no trustworthy second derivatives.
        DataError: If the data are empty or malformed.
        NonFiniteError: If a product is not finite.

    References:
        Ghorbani, Krishnan & Xiao 2019, algorithm 1.
    """
    operator = CurvatureOperator(model, data, loss, curvature=curvature, batch_size=batch_size)
    return spectral_density(
        operator.matvec, operator.dimension, steps=steps, probes=probes, seed=seed
    )


def hessian_trace(
    model: Any,
    data: Any,
    loss: Any,
    *,
    curvature: str = "hessian",
    probes: int = 16,
    batch_size: int = 500,
    seed: int = 0,
) -> TraceEstimate:
    """Estimates the trace of the curvature by Hutchinson's method.

    For a vector v of independent random signs ``v^T H v`` has mean ``tr H``.

    Args:
        model: As in `hessian_spectrum`.
        data: As in `hessian_spectrum`.
        loss: As in `hessian_spectrum`.
        curvature: ``"hessian"`` or ``"ggn"``.
        probes: Number of random vectors, at least 2; each is one pass over the data.
        batch_size: Number of examples per product when ``data`` holds arrays.
        seed: Seed of the random vectors.

    Returns:
        A `TraceEstimate` with its standard error.

    Raises:
        InvalidArgumentError: If an argument is out of range.
        UnsupportedModelError: If the model has no trustworthy second derivatives.
        DataError: If the data are empty or malformed.

    References:
        Hutchinson 1989, "A Stochastic Estimator of the Trace of the Influence Matrix".
    """
    if probes < 2:
        raise InvalidArgumentError(
            f"probes must be at least 2, for an error estimate. Received: probes={probes}"
        )
    operator = CurvatureOperator(model, data, loss, curvature=curvature, batch_size=batch_size)
    generator = np.random.default_rng(seed)
    samples = np.empty(probes)
    for i in range(probes):
        signs = generator.choice([-1.0, 1.0], size=operator.dimension)
        samples[i] = signs @ operator.matvec(signs)
    error = float(samples.std(ddof=1) / np.sqrt(probes))
    return TraceEstimate(float(samples.mean()), error, probes)
