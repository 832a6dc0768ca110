r"""Spectral radius of the Kronecker-factored Fisher over a whole data set.

What `SpectralRadius` penalizes is estimated on parts of batches, with labels drawn from the model.
Here are the same factors, `A_l = E[a a^T]` and `G_l = E[g g^T]`, over all the data, so that

    rho = max_l lambda_max(A_l) lambda_max(G_l)

can be held against the exact top eigenvalue of `hessian_spectrum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tf_kfacprune.curvature.batch import Batch
from tf_kfacprune.curvature.blocks import KroneckerBlock
from tf_kfacprune.curvature.data_passes import batches_of, length_of
from tf_kfacprune.curvature.discovery import find_blocks
from tf_kfacprune.curvature.estimator import LABELS, CurvatureEstimator
from tf_kfacprune.curvature.hessian import checked_network
from tf_kfacprune.curvature.objective import SingleObjective
from tf_kfacprune.errors import DataError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.validation import require

__all__ = ["KroneckerRadius", "spectral_radius"]


@dataclass(frozen=True)
class KroneckerRadius:
    """Spectral radius of the block-diagonal, Kronecker-factored Fisher.

    Attributes:
        radii: Name of a block -> its ``lambda_max(A) lambda_max(G)``.
        labels: Which labels the gradients are of.
        num_examples: Number of examples in the data.
    """

    radii: dict[str, float]
    labels: str
    num_examples: int

    @property
    def radius(self) -> float:
        """The largest of the blocks' radii."""
        return max(self.radii.values())


def spectral_radius(
    model: Any,
    data: Any,
    loss: Any,
    *,
    labels: str = "exact",
    batch_size: int = 500,
    seed: int = 0,
) -> KroneckerRadius:
    """Computes the K-FAC estimate of the curvature's largest eigenvalue over a data set.

    One pass over the data, in inference mode; memory is that of the factors, whatever the number
    of examples. `hessian_spectrum` gives the exact eigenvalue that this estimates.

    Args:
        model: A built `keras.Model`, or a `PrunableModel` (its gates are held at their inference
            values).
        data: ``(x, y)`` arrays, or a `tf.data.Dataset` of batches ``(x, y)``.
        loss: As given to `compile`.
        labels: ``"exact"`` for the Fisher itself (one backward pass per output), ``"sampled"``
            from the model, or ``"data"`` (empirical Fisher).
        batch_size: Number of examples at a time when ``data`` holds arrays. Factors are averaged
            over batches by their examples: where masks leave out entries, it matters a little.
        seed: Seed of sampled labels.

    Returns:
        A `KroneckerRadius` with ``radius`` and ``radii``.

    Raises:
        InvalidArgumentError: If an argument is not one of its options, or the loss has no
            likelihood that is known here.
        UnsupportedModelError: If no layer of the model has Kronecker factors.
        DataError: If the data are empty or malformed.

    Examples:
        >>> import keras, numpy as np
        >>> import tf_kfacprune as kp
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> x, y = np.ones((8, 4), "float32"), np.zeros((8, 1), "float32")
        >>> round(kp.diagnostics.spectral_radius(model, (x, y), "mse").radius, 4)
        10.0

    References:
        Ebrahimi & Klabjan, arXiv 2111.08577, section 3; Martens & Grosse 2015.
    """
    require("spectral_radius", labels in LABELS, "labels", f"one of {LABELS}", labels)
    network = checked_network(model)
    blocks = [block for block in find_blocks(network).blocks if block.is_contraction]
    if not blocks:
        raise UnsupportedModelError(
            f"Model {network.name!r} has no Dense or convolution layer with Kronecker factors."
        )
    objective = SingleObjective(loss)
    if labels != "data" and isinstance(objective.likelihood, str):
        raise InvalidArgumentError(f"labels={labels!r} is not possible: {objective.likelihood}.")
    estimator = CurvatureEstimator(network, objective, keras.random.SeedGenerator(seed))

    @tf.function(reduce_retracing=True, jit_compile=False, autograph=False)
    def factors_of(x: Any, y: Any) -> list[tuple[Any, Any]]:
        look = estimator.look(Batch(x, y), blocks, labels, training=False)
        return [block.factors(look.of(block.layer)) for block in blocks]

    totals: list[list[Any]] = [[0.0, 0.0] for _ in blocks]
    count = 0
    for x, y in batches_of(data, batch_size)():
        size = length_of(y)
        for total, pair in zip(totals, factors_of(x, y), strict=True):
            for k, factor in enumerate(pair):
                total[k] = total[k] + size * np.asarray(factor, np.float64)
        count += size
    if count == 0:
        raise DataError("data: there is no example in it.")
    radii = {
        block.name: float(np.max(_top(block, a / count) * _top(None, g / count)))
        for block, (a, g) in zip(blocks, totals, strict=True)
    }
    return KroneckerRadius(radii, labels, count)


def _top(block: KroneckerBlock | None, factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest eigenvalue, of every group if there are groups."""
    if block is not None and block.a_is_diagonal:
        return np.asarray(factor.max(axis=-1), np.float64)
    return np.asarray(np.linalg.eigvalsh(factor)[..., -1], np.float64)
