r"""Gates of channels over which an operation takes a statistic, as `mean`, `std`, `max` or `any`.

As in the layers that normalize across channels, the statistic is one of the C' of C channels that
are present (p_c = 1). The operation stays what it is and reads, in place of x,

    sum         x_c p_c
    mean        x_c p_c C / C'
    variance    r x_c where present, r mu' elsewhere;  r = sqrt(C / C'), mu' = sum_c p_c x_c / C',
    max, min    x_c where present, -inf (for max) or +inf (for min) elsewhere,
    any, all    x_c where present, false (for any) or true (for all) elsewhere,

of which the statistic over all C channels is that of the C' present ones of x. With all
channels present x is read as it is, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.graph.rules.base import along

__all__ = ["StatisticEdge"]

# What changes nothing, if it is among the values of which the statistic is taken.
_NEUTRAL = {"any": False, "all": True, "max": float("-inf"), "min": float("inf")}


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class StatisticEdge(keras.layers.Layer):
    """Makes closed channels count for nothing in a statistic over channels.

    Args:
        indices: For each channel the number of its gate in the bank, or the number of gates in the
            bank for a channel that is never pruned.
        axis: The channel axis.
        statistic: `"sum"`, `"mean"`, `"variance"`, `"max"` or `"min"`, and of truth values `"any"`
            or `"all"`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self, indices: Sequence[int], axis: int = -1, statistic: str = "mean", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.indices = np.asarray(indices, "int32")
        self.axis = axis
        self.statistic = statistic
        self.supports_masking = True

    def call(self, inputs: Sequence[Any]) -> Any:
        """Returns what the operation reads, given `[x, z, present]` with the bank's outputs."""
        x, _, present = inputs
        always = ops.ones((1,), dtype=present.dtype)
        present = ops.take(ops.concatenate([present, always]), self.indices)
        left = ops.maximum(ops.sum(present), 1.0)
        ratio = float(len(self.indices)) / left
        mask = along(present, self.axis, x)
        if self.statistic in _NEUTRAL:
            return ops.where(ops.cast(mask, "bool"), x, _NEUTRAL[self.statistic])
        if self.statistic == "sum":
            return x * mask
        if self.statistic == "mean":
            return x * mask * ops.cast(ratio, x.dtype)
        mean = ops.sum(x * mask, self.axis, keepdims=True) / ops.cast(left, x.dtype)
        return ops.where(mask > 0, x, mean) * ops.cast(ops.sqrt(ratio), x.dtype)

    def compute_output_spec(self, inputs: Sequence[Any]) -> keras.KerasTensor:
        dtype = "bool" if self.statistic in ("any", "all") else self.compute_dtype
        return keras.KerasTensor(inputs[0].shape, dtype=dtype)

    def compute_mask(self, inputs: Sequence[Any], previous_mask: Any = None) -> Any:
        """The mask of `x` passes through."""
        return previous_mask[0] if isinstance(previous_mask, (list, tuple)) else previous_mask

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "indices": self.indices.tolist(),
            "axis": self.axis,
            "statistic": self.statistic,
        }
