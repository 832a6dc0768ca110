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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_kfacprune.curvature.blocks import Record
from tf_kfacprune.curvature.capture import capture
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
    x: Any,
    mean_losses: Callable[[Any], Sequence[Any]],
) -> Any:
    """F from one batch, in inference mode.

    Args:
        gated: The gated network, its gates neither held open nor settled.
        layers: Its gate layers.
        x: Inputs in the structure of the model's inputs.
        mean_losses: Maps the model's outputs to losses, averaged over the batch, whose Fishers
            add up.

    Returns:
        Tensor of shape `(num_gates,)`, float32.
    """
    logits = [source.logits.value for source in gated.sources]
    with tf.GradientTape(persistent=True) as tape:
        outputs, records = capture(gated.net, x, layers, training=False)
        batch = tf.shape(keras.tree.flatten(x)[0])[0]
        losses = [loss * tf.cast(batch, loss.dtype) for loss in mean_losses(outputs)]
    by_layer = {id(entry.layer): entry for entry in layers}
    places = [_Place(by_layer[id(record.layer)], record, gated.num_gates) for record in records]
    points = [*(record.s for record in records), *logits]
    none = tf.zeros(gated.num_gates)  # where all gates act inside layers
    curvature = none
    for loss in losses:
        found = tape.gradient(loss, points, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        h, slopes = found[: len(records)], found[len(records) :]
        uses = list(zip(places, h, strict=True))
        in_sight = sum((place.slope(g) for place, g in uses), none)
        inside = tf.square(tf.concat(slopes, axis=0)) - tf.square(in_sight)
        curvature += sum((place.curvature(g) for place, g in uses), none)
        curvature += inside / tf.cast(batch, "float32")
    return curvature


class _Place:
    """One use of a gate layer."""

    def __init__(self, entry: GateLayer, record: Record, num_gates: int) -> None:
        self._entry = entry
        self._num_gates = num_gates
        self._x = self._rows(record.x[0] if isinstance(entry.layer, GateEdge) else record.x)

    def curvature(self, h: Any) -> Any:
        """`E sum_t x_t^2 * E mean_t h_t^2`, shape `(num_gates,)`."""
        squares = tf.reduce_mean(tf.reduce_sum(tf.square(self._x), axis=1), axis=0)
        return self._by_gate(squares * tf.reduce_mean(tf.square(self._rows(h)), axis=[0, 1]))

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
