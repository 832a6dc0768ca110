r"""The Kronecker block of a layer: how its weights, inputs and gradients turn into factors.

=======  =============================================================  =====================
symbol   meaning                                                        shape
=======  =============================================================  =====================
`a`      what the weights multiply: inputs, patches of inputs           (*k, batch, T, n_in)
`[a; 1]` the same with the homogeneous coordinate, if there is a bias   (*k, batch, T, n_a)
`s`      pre-activation `W^T [a; 1]`                                    (*k, batch, T, n_out)
`g`      d loss / d s, per example and location                         (*k, batch, T, n_out)
`w`      what a location of an example counts, None for all the same    (batch, T)
`A`      factor of the inputs                                           (*k, n_a, n_a)
`G`      factor of the gradients                                        (*k, n_out, n_out)
`W`      kernel as a matrix, its last row the bias                      (*k, n_a, n_out)
=======  =============================================================  =====================

T is the number of locations at which the layer applies its weights: 1 for a Dense layer on
vectors, the number of output pixels for a convolution. `*k` is empty, or `(groups,)` where the
layer consists of groups that share no weights (grouped and depthwise convolutions, normalization);
their Fisher block is block-diagonal over the groups. The Fisher block is `A (x) G`, with

    expand:  A = E sum_t a_t a_t^T,             G = E mean_t g_t g_t^T
    reduce:  A = E (mean_t a_t)(mean_t a_t)^T,  G = E (sum_t g_t)(sum_t g_t)^T

which agree for T = 1. Expand is exact for deep linear networks whose loss sees every location by
itself, reduce for those whose loss sees their mean.

Examples that count more than others do so in both factors: in A by weights relative to their mean,
in G by the gradients, which hold their roots. Locations behind a Keras mask count in neither.

References:
    Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", section 3. Grosse & Martens 2016, "A Kronecker-factored Approximate Fisher Matrix
    for Convolution Layers", section 3.1. Eschenhagen et al. 2023, "Kronecker-Factored Approximate
    Curvature for Modern Neural Network Architectures", section 3 (expand and reduce).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from tf_kfacprune.curvature.blocks.locations import LocationSample

__all__ = [
    "KroneckerBlock",
    "Record",
    "for_rows",
    "location_weights",
    "spread_mask",
    "total_weight",
]

_TINY = 1e-12  # weights below this count as none


@dataclass(frozen=True)
class Record:
    """One use of a layer in one forward pass.

    Attributes:
        layer: The layer.
        x: Its input.
        s: Its pre-activation; its output, where the layer has no activation.
        mask: Which locations count, boolean, `(batch, ...)` over the first axes of s; None if all.
    """

    layer: keras.layers.Layer
    x: Any
    s: Any
    mask: Any = None


class KroneckerBlock:
    """Base of the Kronecker blocks; one instance serves one kernel, and its bias, of one layer.

    Args:
        layer: A built layer.
        kernel: The weight that the block is about.
        bias: The bias that belongs to it, or None.
        n_in: Number of inputs that an output sees, per group.
        n_out: Number of outputs, per group.
        groups: Number of groups that share no weights, or 0 for an ordinary layer.
        part: What is appended to the layer's name, for layers with several blocks.

    Attributes:
        is_contraction: Whether A depends on the layer's inputs alone and G on gradients alone.
        a_is_diagonal: Whether A is diagonal by nature and is held as a vector.
        attention: The attention layer that the layer is a projection of, or None.
    """

    is_contraction = True
    a_is_diagonal = False
    attention: keras.layers.Layer | None = None

    def __init__(
        self,
        layer: keras.layers.Layer,
        kernel: keras.Variable,
        bias: keras.Variable | None,
        *,
        n_in: int,
        n_out: int,
        groups: int = 0,
        part: str = "",
    ) -> None:
        self.layer = layer
        self.kernel = kernel
        self.bias = bias
        self.n_in = n_in
        self.n_out = n_out
        self.n_a = n_in + (bias is not None)
        self.group_shape: tuple[int, ...] = (groups,) if groups else ()
        self.name = f"{layer.name}/{part}" if part else layer.name

    @property
    def variables(self) -> list[keras.Variable]:
        """The kernel and, if there is one, the bias."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]

    def rows_a(self, record: Record) -> Any:
        """What the weights multiply, without homogeneous coordinate: `(*k, batch, T, n_in)`."""
        raise NotImplementedError

    def rows_g(self, record: Record, g: Any) -> Any:
        """Gradients of the block's pre-activation, shape `(*k, batch, T, n_out)`.

        Args:
            record: A use of the layer.
            g: Per-example gradient with respect to `record.s`.
        """
        raise NotImplementedError

    def project(self, record: Record, u: Any) -> Any:
        """`u^T [a; 1]` at every location, without forming more than is needed.

        Args:
            record: A use of the layer.
            u: Vectors of shape `(*k, n_a)`.

        Returns:
            Tensor of shape `(*k, batch, ...)`, or in any order for which sums over all but the
            first axes `k` are the same.
        """
        rows = ops.cast(self.rows_a(record), "float32")
        vector = ops.reshape(u[..., : self.n_in], (*self.group_shape, 1, self.n_in, 1))
        projection = ops.squeeze(ops.matmul(rows, vector), axis=-1)
        if self.bias is None:
            return projection
        return projection + ops.reshape(u[..., self.n_in], (*self.group_shape, 1, 1))

    def weights_of_projection(self, record: Record, weights: Any, projection: Any) -> Any:
        """What each entry of a projection counts, to be multiplied with it; None if all the same.

        Args:
            record: A use of the layer.
            weights: What each example counts, shape `(batch,)`, or None.
            projection: As `project` returned it.
        """
        mask = self.mask_of_locations(record)
        axes = len(self.group_shape)
        weights = for_rows(weights, ops.shape(record.x)[0])
        if mask is not None:
            return location_weights(mask, weights, ops.shape(projection)[-1])
        if weights is None:
            return None
        return ops.reshape(weights, (-1, *[1] * (len(projection.shape) - axes - 1)))

    def sampled_rows_a(self, record: Record, sample: LocationSample) -> tuple[Any, Any]:
        """Rows of A at some locations, as of `rows_a`, and how many there are for each of them.

        Blocks for which it is cheaper choose the locations before they form the rows.
        """
        rows = self.rows_a(record)
        sampled = sample.of(rows)
        return sampled, _ratio(ops.shape(rows)[-2], ops.shape(sampled)[-2])

    def mask_of_locations(self, record: Record) -> Any:
        """The mask of a record, shape `(batch, T)`, float32, or None."""
        return spread_mask(record.mask, record.s, len(record.s.shape) - 1)

    def factor_a(
        self,
        record: Record,
        g: Any,
        *,
        weights: Any = None,
        examples: Any = None,
        reduce: bool = False,
        sample: LocationSample | None = None,
    ) -> Any:
        """A of one use, shape `(*k, n_a, n_a)`, or its diagonal where A is diagonal; float32.

        Args:
            record: A use of the layer.
            g: Per-example gradient with respect to `record.s` (contractions do not need it).
            weights: What each example counts, shape `(batch,)`, or None.
            examples: Number of examples, of each of which there may be several rows; None for as
                many as there are rows.
            reduce: K-FAC reduce instead of expand.
            sample: Locations that stand for all of them; not together with `reduce`.
        """
        del g
        density: Any = 1.0
        mask = self.mask_of_locations(record)
        if sample is None:
            rows = self.rows_a(record)
        else:
            rows, density = self.sampled_rows_a(record, sample)
            mask = None if mask is None else sample.of(mask[..., None])[..., 0]
        rows = ops.cast(rows, "float32")
        count = total_weight(weights, ops.shape(rows)[-3] if examples is None else examples)
        weights = for_rows(weights, ops.shape(rows)[-3])
        w = location_weights(mask, weights, ops.shape(rows)[-2])
        if reduce:
            rows = _mean_over_locations(rows, w)
            w = None if weights is None else weights[:, None]
        return second_moment(self, rows, w) / (count / density)

    def factor_g(
        self,
        record: Record,
        g: Any,
        *,
        weights: Any = None,
        examples: Any = None,
        reduce: bool = False,
        sample: LocationSample | None = None,
    ) -> Any:
        """G of one use, shape `(*k, n_out, n_out)`, float32; arguments as in `factor_a`."""
        del weights, examples  # g holds the weights
        rows = ops.cast(self.rows_g(record, g), "float32")
        mask = self.mask_of_locations(record)
        if sample is not None:
            rows = sample.of(rows)
            mask = None if mask is None else sample.of(mask[..., None])[..., 0]
        if reduce:
            rows, mask = ops.sum(rows, axis=-2, keepdims=True), None
        flat = ops.reshape(rows, (*self.group_shape, -1, self.n_out))
        if mask is None:
            count = ops.cast(ops.shape(flat)[-2], "float32")
        else:
            count = ops.maximum(ops.sum(mask), 1.0)
        return ops.matmul(ops.swapaxes(flat, -1, -2), flat) / count

    def factors(self, uses: Any, **how: Any) -> tuple[Any, Any]:
        """A and G of one batch; uses of a shared layer count as locations.

        Args:
            uses: The uses of the block's layer in one pass, a `Uses`.
            **how: `reduce` and `sample` of `factor_a` and `factor_g`.

        Returns:
            `(A, G)` as from `factor_a` and `factor_g`.
        """
        about = {"weights": uses.weights, "examples": uses.examples, **how}
        one_each = zip(uses.records, uses.probes[0], strict=True)
        a = [self.factor_a(record, g, **about) for record, g in one_each]
        shares = self.shares_of_locations(uses, reduce=how.get("reduce", False))
        g = [
            share * self.factor_g(record, g, **about)
            for probe in uses.probes
            for record, g, share in zip(uses.records, probe, shares, strict=True)
        ]
        return functools.reduce(ops.add, a), functools.reduce(ops.add, g)

    def shares_of_locations(self, uses: Any, *, reduce: bool = False) -> list[Any]:
        """Which share of all locations that the layer is applied at belongs to each use.

        Args:
            uses: The uses of the block's layer in one pass, a `Uses`.
            reduce: Whether the locations of an example are one.

        Returns:
            Scalars that add up to 1, one per use.
        """
        if len(uses.records) == 1:
            return [1.0]
        counts = [self._relative_locations(record, reduce) for record in uses.records]
        total = ops.maximum(functools.reduce(ops.add, counts), _TINY)
        return [count / total for count in counts]

    def _relative_locations(self, record: Record, reduce: bool) -> Any:
        """The locations that count, in units that are the same for all uses of a layer."""
        if reduce:
            return ops.cast(ops.shape(record.s)[0], "float32")
        size = ops.cast(ops.size(record.s), "float32")
        mask = self.mask_of_locations(record)
        return size if mask is None else size * ops.mean(mask)

    def kernel_to_matrix(self, kernel: Any) -> Any:
        """A kernel-shaped tensor as a matrix, shape `(*k, n_in, n_out)`."""
        return ops.reshape(kernel, (*self.group_shape, self.n_in, self.n_out))

    def matrix_to_kernel(self, matrix: Any) -> Any:
        """Inverse of `kernel_to_matrix`."""
        return ops.reshape(matrix, self.kernel.shape)

    def to_matrix(self, tensors: Sequence[Any]) -> Any:
        """Tensors shaped like `variables` as one matrix, shape `(*k, n_a, n_out)`."""
        matrix = self.kernel_to_matrix(tensors[0])
        if self.bias is None:
            return matrix
        bias = ops.reshape(tensors[1], (*self.group_shape, 1, self.n_out))
        return ops.concatenate([matrix, bias], axis=-2)

    def from_matrix(self, matrix: Any) -> list[Any]:
        """Inverse of `to_matrix`."""
        kernel = self.matrix_to_kernel(matrix[..., : self.n_in, :])
        if self.bias is None:
            return [kernel]
        return [kernel, ops.reshape(matrix[..., self.n_in, :], self.bias.shape)]

    def homogeneous(self, rows: Any) -> Any:
        """Appends the homogeneous coordinate to rows, if the layer has a bias."""
        if self.bias is None:
            return rows
        return ops.concatenate([rows, ops.ones_like(rows[..., :1])], axis=-1)


def second_moment(block: KroneckerBlock, rows: Any, w: Any = None) -> Any:
    """`sum w [a; 1] [a; 1]^T` over all rows, without appending a column to them."""
    flat = ops.reshape(rows, (*block.group_shape, -1, block.n_in))
    weighted, count = flat, ops.cast(ops.shape(flat)[-2], "float32")
    if w is not None:
        weighted, count = flat * ops.reshape(w, (-1, 1)), ops.sum(w)
    factor = ops.matmul(ops.swapaxes(weighted, -1, -2), flat)
    if block.bias is None:
        return factor
    sums = ops.sum(weighted, axis=-2, keepdims=True)
    factor = ops.concatenate([factor, sums], axis=-2)
    last = ops.concatenate([sums, count * ops.ones_like(sums[..., :1])], axis=-1)
    return ops.concatenate([factor, ops.swapaxes(last, -1, -2)], axis=-1)


def spread_mask(mask: Any, tensor: Any, axes: int) -> Any:
    """A mask over the first axes of a tensor, spread over its first `axes` ones: `(batch, T)`.

    Args:
        mask: Boolean, `(batch, ...)`, or None.
        tensor: What it masks.
        axes: Number of axes that are the batch and locations.
    """
    if mask is None or len(mask.shape) > axes:
        return None
    shape = ops.shape(tensor)[:axes]
    wide = ops.reshape(mask, (*ops.shape(mask), *[1] * (axes - len(mask.shape))))
    spread = ops.broadcast_to(wide, shape)
    return ops.cast(ops.reshape(spread, (shape[0], -1)), "float32")


def for_rows(weights: Any, rows: Any) -> Any:
    """Weights of examples for the rows of a batch, where a model makes several of each example.

    Args:
        weights: Shape `(batch,)`, or None.
        rows: Number of rows, a multiple of the batch.
    """
    if weights is None:
        return None
    batch = ops.shape(weights)[0]
    of_example = rows // ops.maximum(batch, 1)  # a replica may have no examples
    return ops.reshape(ops.broadcast_to(weights[:, None], (batch, of_example)), (-1,))


def total_weight(weights: Any, examples: Any) -> Any:
    """What all examples count together, a scalar float32 tensor.

    Args:
        weights: Shape `(batch,)`, or None.
        examples: Number of examples.
    """
    if weights is None:
        return ops.cast(examples, "float32")
    return ops.maximum(ops.sum(weights), _TINY)


def location_weights(mask: Any, weights: Any, locations: Any) -> Any:
    """w, shape `(batch, T)`; None where every location of every example counts the same.

    Args:
        mask: Shape `(batch, T)`, or None.
        weights: What each example counts, shape `(batch,)`, or None.
        locations: T.
    """
    if weights is None:
        return mask
    spread = ops.broadcast_to(weights[:, None], (ops.shape(weights)[0], locations))
    return spread if mask is None else mask * spread


def _mean_over_locations(rows: Any, w: Any) -> Any:
    """Means of rows `(*k, batch, T, n)` over the locations that count."""
    if w is None:
        return ops.mean(rows, axis=-2, keepdims=True)
    share = w / ops.maximum(ops.sum(w, axis=-1, keepdims=True), _TINY)
    return ops.sum(rows * share[..., None], axis=-2, keepdims=True)


def _ratio(whole: Any, part: Any) -> Any:
    return ops.cast(whole, "float32") / ops.cast(part, "float32")
