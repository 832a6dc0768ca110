r"""Layers that lose input channels, what they read, and what they absorb.

=========  =========================================================  =================
symbol     meaning                                                    shape
=========  =========================================================  =================
`a`        input of the reader (patches, for a convolution), followed
           by the homogeneous coordinate 1                            (n_in + 1,)
`W`        kernel as a matrix, its last row the bias                  (n_in + 1, n_out)
`A`        E a a^T over the data, the Kronecker factor                (n_in + 1, n_in + 1)
`K`, `R`   entries of `a` that are kept (with the 1) and removed
=========  =========================================================  =================

Of all linear predictions of `a_R` from `a_K`, that with `B = (A_KK + eps I)^-1 A_KR` is closest in
mean square. Where `a_R` is missing, the reader puts `W_R^T B^T a_K` in place of `W_R^T a_R`:

    W_K <- W_K + B W_R.

The bias belongs to K, so it takes up the mean; a layer without one has no homogeneous coordinate.
All kernel positions of a removed channel belong to R. A is taken over the network as it was before
channels went: closed gates are opened, gates in between keep their values.

References:
    Hassibi & Stork 1993, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon".
    Wang et al. 2019, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tf_kfacprune.compaction.plan import RemovalPlan
from tf_kfacprune.graph import Call, Edge
from tf_kfacprune.linalg import conv_patches

__all__ = ["LayerCompensation", "Reader", "find_readers"]

SHARED = "the layer is called more than once"
UNSUPPORTED = "layers of this type cannot be compensated"
GROUPED = "grouped convolutions cannot be compensated"
CHANNELS_FIRST = "channels_first convolutions cannot be compensated"
INSIDE = "the layer reads the channels inside"
TOO_LARGE = "the layer reads more than {limit} values at once"
NOT_FOUND = "the compact model has no such layer"

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_LARGEST_INPUT = 8192  # values per application of a kernel; A of this size takes half a GiB
_RELATIVE_DAMPING = 1e-4  # eps, relative to the mean of the diagonal of A_KK


@dataclass(frozen=True)
class LayerCompensation:
    """How well one layer reproduces what it put out before channels were removed.

    Attributes:
        layer: Name of the layer.
        removed: Number of input channels removed.
        kept: Number of input channels left.
        before: Mean square change of its pre-activations without compensation, relative to their
            variance.
        after: The same with compensation.
    """

    layer: str
    removed: int
    kept: int
    before: float
    after: float


@dataclass(eq=False)
class Reader:
    """A layer that loses input channels, and the second moment of what it reads."""

    call: Call
    removed: np.ndarray  # channels with a closed gate
    kept: np.ndarray  # the others
    stays: np.ndarray  # channels that the compact layer has
    outputs: np.ndarray  # output channels that the compact layer has
    scale: np.ndarray  # gate values of all channels
    moment: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.moment = np.zeros((self.n_in + 1, self.n_in + 1))

    @property
    def layer(self) -> Any:
        """The layer, with all its channels."""
        return self.call.operation

    @property
    def n_in(self) -> int:
        """Number of values that one application of the kernel reads."""
        return int(np.prod(self.layer.kernel.shape[:-1]))

    def rows(self, channels: np.ndarray) -> np.ndarray:
        """The rows of the kernel matrix that belong to channels, at all kernel positions."""
        per_position = int(self.layer.kernel.shape[-2])
        starts = np.arange(self.n_in // per_position) * per_position
        return (starts[:, None] + channels).ravel()

    def observe(self, x: Any) -> None:
        """Adds a batch of inputs to the second moment."""
        layer = self.layer
        x = ops.cast(x, "float32")
        if isinstance(layer, _CONVOLUTIONS):
            x = conv_patches(
                x, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate
            )
        a = ops.reshape(x, (-1, self.n_in))
        second = ops.convert_to_numpy(ops.matmul(ops.transpose(a), a))
        sums = ops.convert_to_numpy(ops.sum(a, axis=0))
        self.moment[:-1, :-1] += second
        self.moment[-1, :-1] += sums
        self.moment[:-1, -1] += sums
        self.moment[-1, -1] += a.shape[0]

    def absorb(self, compact_layer: Any) -> LayerCompensation:
        """Adds B W_R to the weights of the compact layer."""
        layer, has_bias = self.layer, self.layer.bias is not None
        kernel = _to_numpy(layer.kernel).reshape(self.n_in, -1)
        bias = _to_numpy(layer.bias) if has_bias else np.zeros(kernel.shape[1])
        weights = np.concatenate([kernel, bias[None]])
        moment = self.moment / self.moment[-1, -1]
        k = np.append(self.rows(self.kept), [self.n_in] if has_bias else []).astype(int)
        r = self.rows(self.removed)
        prediction = _regression(moment, k, r)
        change = np.zeros_like(weights)
        change[r] = -weights[r]
        before = _mean_square(change, moment)
        change[k] = prediction @ weights[r]
        after = _mean_square(change, moment)
        mean = moment[-1] @ weights
        variance = max(_mean_square(weights, moment) - float(mean @ mean), 1e-30)
        self._add(compact_layer, change)
        return LayerCompensation(
            layer.name, len(self.removed), len(self.kept), before / variance, after / variance
        )

    def _add(self, compact_layer: Any, change: np.ndarray) -> None:
        # What a gate scales is folded into the kernel, and so is what is added to the kernel.
        folded = change[: self.n_in].reshape(self.layer.kernel.shape) * self.scale[:, None]
        folded = folded[..., self.stays, :][..., self.outputs]
        compact_layer.kernel.assign(_to_numpy(compact_layer.kernel) + folded)
        if self.layer.bias is not None:
            bias = _to_numpy(compact_layer.bias) + change[self.n_in, self.outputs]
            compact_layer.bias.assign(bias)


def _regression(moment: np.ndarray, k: np.ndarray, r: np.ndarray) -> np.ndarray:
    """B = (A_KK + eps I)^-1 A_KR in float64."""
    if not len(k):
        return np.zeros((0, len(r)))
    a_kk = moment[np.ix_(k, k)]
    eps = _RELATIVE_DAMPING * np.trace(a_kk) / len(k) + np.finfo("float64").tiny
    return np.linalg.solve(a_kk + eps * np.eye(len(k)), moment[np.ix_(k, r)])


def _mean_square(change: np.ndarray, moment: np.ndarray) -> float:
    """E |change^T a|^2, summed over outputs."""
    return float(np.sum(change * (moment @ change)))


def find_readers(
    plan: RemovalPlan, compact_layers: dict[str, Any]
) -> tuple[list[Reader], dict[str, str]]:
    """The layers to compensate, and those that cannot be, with the reason."""
    readers: list[Reader] = []
    skipped: dict[str, str] = {}
    edges = [edge for edge in plan.channels.edges if edge.flattened != "channels"]
    calls = [edge.layer for edge in edges if edge.value is not None]
    for edge in edges:
        stays = plan.positions(edge.neurons)
        is_whole = len(stays) == len(edge.neurons)
        if is_whole or not plan.is_needed(edge.call) or plan.is_cut(edge.call):
            continue
        reason = _why_not(edge, calls.count(edge.layer), compact_layers)
        if reason is not None:
            skipped[edge.call.path] = reason
            continue
        scale = plan.scale(edge.layer, edge.role)
        scale = np.ones(len(edge.neurons), "float32") if scale is None else scale
        kept = stays[scale[stays] > 0]
        removed = np.setdiff1d(np.arange(len(edge.neurons)), kept)
        outputs = np.arange(edge.layer.kernel.shape[-1])
        if "out" in plan.channels.roles(edge.layer):
            outputs = plan.positions(plan.channels.roles(edge.layer)["out"])
        readers.append(Reader(edge.call, removed, kept, stays, outputs, scale))
    return readers, skipped


def _why_not(edge: Edge, num_calls: int, compact_layers: dict[str, Any]) -> str | None:
    layer = edge.layer
    if edge.value is None:
        return INSIDE
    if type(layer) not in (layers.Dense, *_CONVOLUTIONS):
        return f"{UNSUPPORTED} ({type(layer).__name__})"
    if num_calls > 1:
        return SHARED
    if getattr(layer, "groups", 1) > 1:
        return GROUPED
    if getattr(layer, "data_format", None) == "channels_first":
        return CHANNELS_FIRST
    if np.prod(layer.kernel.shape[:-1]) > _LARGEST_INPUT:
        return TOO_LARGE.format(limit=_LARGEST_INPUT)
    return None if layer.name in compact_layers else NOT_FOUND


def _to_numpy(variable: keras.Variable) -> np.ndarray:
    return ops.convert_to_numpy(ops.convert_to_tensor(variable)).astype("float64")
