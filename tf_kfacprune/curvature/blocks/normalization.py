"""Block of the scale and shift that follow a normalization."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from tf_kfacprune.curvature.blocks.base import KroneckerBlock, Record, spread_mask

__all__ = ["ScaleShiftBlock"]


class ScaleShiftBlock(KroneckerBlock):
    r"""Scale and shift of a normalization: per channel the exact 2 x 2 Fisher of both.

    With normalized input x^ the layer computes `s = gamma x^ + beta`, so that an example's gradient
    for one channel is `d = (sum_t g_t x^_t, sum_t g_t)`, added up over all uses of the layer, and
    its block `E[d d^T]`; there is nothing to factorize, A holds the block and G is one.

    Args:
        layer: BatchNormalization, LayerNormalization or RMSNormalization over the last axis.
    """

    is_contraction = False

    def __init__(self, layer: keras.layers.Layer) -> None:
        scale, shift = _scale_of(layer), getattr(layer, "beta", None)
        self._has_scale = scale is not None
        present = [v for v in (scale, shift) if v is not None]
        channels = int(present[0].shape[0])
        super().__init__(layer, present[0], None, n_in=len(present), n_out=1, groups=channels)
        self._variables = present

    @property
    def variables(self) -> list[keras.Variable]:
        return self._variables

    def rows_a(self, record: Record) -> Any:
        raise NotImplementedError

    def factor_a(
        self,
        record: Record,
        g: Any,
        *,
        weights: Any = None,
        examples: Any = None,
        reduce: bool = False,
        sample: Any = None,
    ) -> Any:
        del weights, reduce, sample  # g holds the weights; the block is exact either way
        return _mean_square(self._slopes(record, g, examples))

    def _slopes(self, record: Record, g: Any, examples: Any) -> Any:
        """D of each example, shape `(channels, batch, n_in)`."""
        batch = ops.shape(g)[0] if examples is None else examples
        channels = self.group_shape[0]
        g = ops.reshape(ops.cast(g, "float32"), (batch, -1, channels))
        parts = []
        if self._has_scale:
            normalized = ops.reshape(_normalized(self.layer, record), (batch, -1, channels))
            parts.append(ops.sum(g * normalized, axis=1))
        if len(parts) < self.n_in:
            parts.append(ops.sum(g, axis=1))
        return ops.transpose(ops.stack(parts, axis=-1), (1, 0, 2))

    def factor_g(self, record: Record, g: Any, **how: Any) -> Any:
        del record, g, how
        return ops.ones((*self.group_shape, 1, 1))

    def factors(self, uses: Any, **how: Any) -> tuple[Any, Any]:
        del how
        found: Any = 0.0
        for probe in uses.probes:
            of_uses = zip(uses.records, probe, strict=True)
            found += _mean_square(sum(self._slopes(r, g, uses.examples) for r, g in of_uses))
        return found, self.factor_g(uses.records[0], None)

    def to_matrix(self, tensors: Any) -> Any:
        return ops.stack(list(tensors), axis=-1)[..., None]

    def from_matrix(self, matrix: Any) -> list[Any]:
        return [matrix[:, k, 0] for k in range(self.n_in)]


def _mean_square(d: Any) -> Any:
    """`E[d d^T]` of every channel, from d of shape `(channels, batch, n)`."""
    return ops.matmul(ops.swapaxes(d, -1, -2), d) / ops.cast(ops.shape(d)[1], "float32")


def _scale_of(layer: keras.layers.Layer) -> keras.Variable | None:
    if isinstance(layer, keras.layers.RMSNormalization):
        return layer.scale
    return layer.gamma


def _normalized(layer: keras.layers.Layer, record: Record) -> Any:
    """The normalized input, before scale and shift, as in training."""
    x = ops.cast(record.x, "float32")
    axes = [-1]
    mask = None
    if isinstance(layer, keras.layers.BatchNormalization):
        axes = list(range(len(x.shape) - 1))
        mask = spread_mask(record.mask, x, len(x.shape) - 1)
    if isinstance(layer, keras.layers.RMSNormalization) or getattr(layer, "rms_scaling", False):
        square = ops.mean(ops.square(x), axis=axes, keepdims=True)
        return x * ops.rsqrt(square + layer.epsilon)

    def mean_of(values: Any) -> Any:
        if mask is None:
            return ops.mean(values, axis=axes, keepdims=True)
        # As in Keras, what is masked has no part in the statistics of a batch.
        w = ops.reshape(mask, (*ops.shape(x)[:-1], 1))
        return ops.sum(w * values, axis=axes, keepdims=True) / ops.maximum(ops.sum(w), 1.0)

    mean = mean_of(x)
    variance = mean_of(ops.square(x - mean))
    return (x - mean) * ops.rsqrt(variance + layer.epsilon)
