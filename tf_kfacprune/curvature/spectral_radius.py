r"""Spectral radius of the Kronecker-factored Fisher, and its gradient.

=========  ===========================================================  ===========
symbol     meaning                                                      shape
=========  ===========================================================  ===========
`u`        unit eigenvector of A for its largest eigenvalue             (n_a,)
`v`        unit eigenvector of G for its largest eigenvalue             (n_out,)
`rho_l`    lambda_max(A_l) lambda_max(G_l)                              scalar
=========  ===========================================================  ===========

The eigenvalues of `A (x) G` are the products of theirs, so the block-diagonal Fisher has spectral
radius `max_l rho_l`. With the eigenvectors held constant,

    lambda_max(A) = mean_examples sum_t (u^T [a_t; 1])^2,
    lambda_max(G) = mean_examples mean_t (v^T g_t)^2,

are Rayleigh quotients whose gradients are those of the eigenvalues (exactly, for simple ones).
Neither A nor G is formed: `u^T a` of a convolution is a convolution with a single filter.

What a radius is worth depends on scales that mean nothing: inputs five times as large have kernels
a fifth as large and radii 25 times as large; one layer can be scaled up and the next one down. The
relative radius `rho_l |W_l|^2` sees none of that. `e^2 / 2` times it is the rise of the loss when
the weights of the layer move by a share e of their norm in the worst direction: loss against loss.

References:
    Ebrahimi & Klabjan, arXiv 2111.08577, section 3. Sandler, Klabjan, Luo 2021 (hinge).
    Magnus 1985, "On differentiating eigenvalues and eigenvectors".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tf_kfacprune.curvature.blocks import KroneckerBlock, total_weight
from tf_kfacprune.curvature.estimator import Uses
from tf_kfacprune.validation import require, require_count, require_number

__all__ = ["SpectralRadius", "energy_of_gradients", "energy_of_inputs"]

_REDUCTIONS = ("max", "sum", "smooth_max")
_SMOOTH_MAX_POWER = 8
_TINY = 1e-20


def energy_of_inputs(block: KroneckerBlock, uses: Uses, u: Any) -> Any:
    """`u^T A u` of every group, shape `(k,)`, for u the eigenvectors of the largest eigenvalue.

    Args:
        block: The Kronecker block of a contraction.
        uses: The uses of its layer in one pass; those of a shared layer add up.
        u: Vectors, shape `(*k, n_a)`.
    """
    groups = block.group_shape or (1,)
    total: Any = 0.0
    for record in uses.records:
        squares = ops.square(ops.cast(block.project(record, u), "float32"))
        w = block.weights_of_projection(record, uses.weights, squares)
        total += ops.sum(ops.reshape(squares if w is None else squares * w, (*groups, -1)), axis=-1)
    rows = ops.shape(uses.records[0].x)[0]
    return total / total_weight(uses.weights, rows if uses.examples is None else uses.examples)


def energy_of_gradients(block: KroneckerBlock, uses: Uses, v: Any) -> Any:
    """`v^T G v` of every group, shape `(k,)`; arguments as in `energy_of_inputs`.

    Args:
        block: The Kronecker block of a contraction.
        uses: The uses of its layer in one pass; those of a shared layer count as locations.
        v: Vectors, shape `(*k, n_out)`.
    """
    groups = block.group_shape or (1,)
    vector = ops.reshape(v, (*block.group_shape, 1, block.n_out, 1))
    shares = block.shares_of_locations(uses)
    total: Any = 0.0
    for probe in uses.probes:
        for record, g, share in zip(uses.records, probe, shares, strict=True):
            rows = ops.cast(block.rows_g(record, g), "float32")
            squares = ops.reshape(ops.square(ops.matmul(rows, vector)), (*groups, -1))
            mask = block.mask_of_locations(record)
            count = ops.cast(ops.shape(squares)[-1], "float32") if mask is None else ops.sum(mask)
            total += share * ops.sum(squares, axis=-1) / ops.maximum(count, 1.0)
    return total


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class SpectralRadius:
    """Penalty `strength * max(0, radius - threshold)` on the spectral radius of the curvature.

    Its gradient is never larger than a share of the loss', variable by variable: no strength
    destroys a training.

    Args:
        strength: Weight mu of the penalty, >= 0; 0 only measures.
        reduction_to: How far the radius shall come down, in (0, 1): below this share of what it was
            in the first 20 evaluations there is no penalty any more. None: as far as it goes.
        relative: Whether radii are relative, `rho_l |W_l|^2` with the kernel's norm: the strength
            then means the same on every model, `e^2 / 2` for weights that move by a share e (1e-4:
            1.4 %). Else they are the `rho_l` themselves.
        threshold: Radius below which there is no penalty, >= 0; of relative radii, if they are.
        reduction: How the layers' radii become one: `"sum"` (a bound on the spectral radius of
            the Fisher, blocks off the diagonal included), `"max"` (the spectral radius of the
            block-diagonal Fisher) or `"smooth_max"` (their 8-norm).
        every: The penalty is evaluated at every `every`-th step, with weight `every`.
        batch_fraction: Share of the batch it is evaluated on, in (0, 1]; at least 16 examples, as
            far as there are so many.
        labels: `"sampled"` from the model (true Fisher) or `"data"` (empirical Fisher).

    Raises:
        InvalidArgumentError: If an argument is out of range.

    Examples:
        >>> curvature = kp.SpectralRadius(1e-4, every=4, batch_fraction=0.25)

    References:
        Ebrahimi & Klabjan, arXiv 2111.08577; Sandler, Klabjan, Luo 2021; Tsuzuku, Sato & Sugiyama
        2020, "Normalized Flat Minima" (relative radii).
    """

    def __init__(
        self,
        strength: float = 1e-4,
        *,
        reduction_to: float | None = None,
        relative: bool = True,
        threshold: float = 0.0,
        reduction: str = "sum",
        every: int = 4,
        batch_fraction: float = 0.25,
        labels: str = "sampled",
    ) -> None:
        check = functools.partial(require, "SpectralRadius")
        check_number = functools.partial(require_number, "SpectralRadius")
        check_number("strength", strength, "[0, inf)")
        check_number("reduction_to", reduction_to, "(0, 1)", optional=True)
        check(isinstance(relative, bool), "relative", "True or False", relative)
        check_number("threshold", threshold, "[0, inf]")
        check(
            reduction in _REDUCTIONS,
            "reduction",
            f"one of {_REDUCTIONS}",
            reduction,
        )
        require_count("SpectralRadius", "every", every)
        check_number("batch_fraction", batch_fraction, "(0, 1]")
        check(labels in ("sampled", "data"), "labels", "'sampled' or 'data'", labels)
        self.strength = strength
        self.reduction_to = reduction_to
        self.relative = relative
        self.threshold = threshold
        self.reduction = reduction
        self.every = every
        self.batch_fraction = batch_fraction
        self.labels = labels

    def reduce(self, radii: Sequence[Any]) -> Any:
        """One radius from those of the layers.

        Args:
            radii: Scalars rho_l.

        Returns:
            Scalar.
        """
        stacked = ops.stack(radii)
        if self.reduction == "sum":
            return ops.sum(stacked)
        largest = ops.max(stacked)
        if self.reduction == "max":
            return largest
        scale = ops.stop_gradient(largest) + _TINY
        powers = ops.sum(ops.power(stacked / scale, _SMOOTH_MAX_POWER))
        return scale * ops.power(powers + _TINY, 1.0 / _SMOOTH_MAX_POWER)

    def get_config(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "reduction_to": self.reduction_to,
            "relative": self.relative,
            "threshold": self.threshold,
            "reduction": self.reduction,
            "every": self.every,
            "batch_fraction": self.batch_fraction,
            "labels": self.labels,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpectralRadius:
        return cls(**config)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"SpectralRadius({settings})"
