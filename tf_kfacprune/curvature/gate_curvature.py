r"""Curvature of a network along each of its gates: what closing a neuron costs, to second order.

========  ==============================================================  ==================
symbol    meaning                                                         shape
========  ==============================================================  ==================
`z`       gates                                                           (n,)
`x`       what one gate layer reads                                       (batch, T, C)
`h`       d loss / d (z x) at that place, per example and location        (batch, T, C)
`d`       d loss / d z at that place, per example: `sum_t x_t h_t`        (batch, C)
`D`       d loss / d z, summed over places and examples                   (n,)
`F`       diagonal of the Fisher of the gates                             (n,)
========  ==============================================================  ==================

Kronecker-factored, as in K-FAC, and summed over the places at which a gate acts,

    F = sum_places E sum_t x_t^2 * E mean_t h_t^2.

In front of a Dense layer with weights W, `h = W^T g` and F is `A_jj (W_j^T G W_j)`, twice the
quadratic form of K-FAC for the removal of neuron j. Layers that read through the same gate layer
count as one, their weights side by side. A closed gate has a curvature like any other, that of
reopening: x is taken before the gate, h behind it.

Where gates act inside a layer (heads of attention, recurrent units) there is neither x nor h, but D
is known. With labels sampled from the model, gradients of different examples are independent with
mean zero, so that `E D^2` is the sum of the examples' squares, and what the places in sight do not
explain,

    (D^2 - (sum_places sum_examples d)^2) / batch,

is added. It is zero for gates that act in sight only.

References:
    Martens & Grosse 2015, section 3.1. LeCun, Denker, Solla 1989, "Optimal Brain Damage".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tf_kfacprune.curvature.batch import Batch
from tf_kfacprune.curvature.blocks import (
    Record,
    for_rows,
    location_weights,
    spread_mask,
    total_weight,
)
from tf_kfacprune.curvature.estimator import CurvatureEstimator, Look
from tf_kfacprune.gates import GatedNetwork, GateEdge, NeuronGate

__all__ = ["GateLayer", "find_gate_layers", "gate_curvature"]


@dataclass(frozen=True)
class GateLayer:
    """A layer that multiplies data by gates.

    Attributes:
        layer: The layer, a `GateEdge` or `NeuronGate`.
        gates: For each channel the number of its gate; the number of all gates where it has none.
    """

    layer: GateEdge | NeuronGate
    gates: np.ndarray


def find_gate_layers(gated: GatedNetwork) -> list[GateLayer]:
    """The layers of a gated network that multiply data by gates, each once."""
    flow, found = gated.channels.flow, {}
    for call in gated.graph.calls:
        layer = call.operation
        if isinstance(layer, NeuronGate):
            found[layer] = flow.slot_sources[layer] + np.arange(layer.size)
        elif isinstance(layer, GateEdge):
            bank = call.inputs[1]
            is_gate = layer.indices < bank.shape[0]
            origin = flow.slot_origin[bank]
            found[layer] = np.where(is_gate, origin + layer.indices, gated.num_gates)
    return [GateLayer(layer, gates.astype("int32")) for layer, gates in found.items()]


def gate_curvature(
    gated: GatedNetwork,
    layers: Sequence[GateLayer],
    estimator: CurvatureEstimator,
    batch: Batch,
    labels: str,
    *,
    training: bool,
) -> Any:
    """F from one batch.

    Args:
        gated: The gated network, its gates neither held open nor settled.
        layers: Its gate layers.
        estimator: What looks at the gated network.
        batch: The batch, or a part of one.
        labels: `"sampled"`, `"exact"` or `"data"`.
        training: Whether layers run in training mode.

    Returns:
        Tensor of shape `(num_gates,)`, float32.
    """
    parameters = [source.parameters.value for source in gated.sources]
    look = estimator.look(batch, layers, labels, training=training, points=parameters)
    by_layer = {id(entry.layer): entry for entry in layers}
    places = [
        _Place(by_layer[id(record.layer)], record, gated.num_gates) for record in look.records
    ]
    none = tf.zeros(gated.num_gates)  # where all gates act inside layers
    curvature = none
    for h, slopes in zip(look.probes, look.points, strict=True):
        uses = list(zip(places, h, strict=True))
        in_sight = sum((place.slope(g) for place, g in uses), none)
        inside = tf.square(tf.concat(slopes, axis=0)) - tf.square(in_sight)
        curvature += sum((place.curvature(g, look) for place, g in uses), none)
        curvature += inside / tf.cast(look.examples, "float32")
    return curvature


class _Place:
    """One use of a gate layer."""

    def __init__(self, entry: GateLayer, record: Record, num_gates: int) -> None:
        self._entry = entry
        self._num_gates = num_gates
        x = record.x[0] if isinstance(entry.layer, GateEdge) else record.x
        self._x = self._rows(x)
        rank = len(x.shape)
        is_last = entry.layer.axis % rank == rank - 1
        self._mask = spread_mask(record.mask, x, rank - 1) if is_last else None

    def curvature(self, h: Any, look: Look) -> Any:
        """`E sum_t x_t^2 * E mean_t h_t^2`, shape `(num_gates,)`."""
        x, h = tf.square(self._x), tf.square(self._rows(h))
        shape = tf.shape(x)
        total = total_weight(look.weights, look.examples)
        weights = for_rows(look.weights, shape[0])
        w = location_weights(self._mask, weights, shape[1])
        if w is not None:
            x = x * w[..., None]
        locations = tf.cast(shape[0] * shape[1], "float32")
        if self._mask is not None:
            locations = tf.maximum(tf.reduce_sum(self._mask), 1.0)
        squares = tf.reduce_sum(x, axis=[0, 1]) / total
        return self._by_gate(squares * tf.reduce_sum(h, axis=[0, 1]) / locations)

    def slope(self, h: Any) -> Any:
        """Sum of d over the examples, shape `(num_gates,)`."""
        return self._by_gate(tf.reduce_sum(self._x * self._rows(h), axis=[0, 1]))

    def _rows(self, tensor: Any) -> Any:
        """`(batch, ..., C, ...)` as `(batch, T, C)`, float32."""
        tensor = tf.cast(tensor, "float32")
        rank = len(tensor.shape)
        axis = self._entry.layer.axis % rank
        moved = tf.transpose(tensor, [*(k for k in range(rank) if k != axis), axis])
        return tf.reshape(moved, [tf.shape(tensor)[0], -1, tensor.shape[axis]])

    def _by_gate(self, per_channel: Any) -> Any:
        gates, count = self._entry.gates, self._num_gates
        return tf.math.unsorted_segment_sum(per_channel, gates, count + 1)[:count]
