r"""Curvature of a network along each of its gates: what closing a neuron costs, to second order.

========  ==============================================================  ==================
symbol    meaning                                                         shape
========  ==============================================================  ==================
`z`       gates                                                           (n,)
`x`       what one gate layer reads                                       (batch, T, C)
`h`       d loss / d (z x) at that place, per example and location        (batch, T, C)
`d`       d loss / d z, per example: `sum_places sum_t x_t h_t`           (batch, n)
`F`       diagonal of the Fisher of the gates, `E d^2`                    (n,)
========  ==============================================================  ==================

In front of a contraction with weights W, `h = W^T g`, so `E x^2 E h^2 = A_jj (W_j^T G W_j)`: the
quadratic form of K-FAC for the removal of neuron j from that contraction. The sum of these over
all contractions that a gate stands in front of is the Kronecker-factored curvature of the gate;
`E d^2` is what it approximates. Both are zero for no neuron only because it is closed: x is taken
before the gate, h behind it.

Where gates act inside a layer (heads of attention, recurrent units) there is no x and no h. What is
known is the sum over the batch, `D = sum d`. With labels sampled from the model the d of different
examples are independent with mean zero, hence `E D^2 = sum E d^2`, and

    F = (sum d_seen^2 + D^2 - (sum d_seen)^2) / batch

is unbiased, with `d_seen` the part of d that gate layers show.

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
    factored: bool = True,
) -> Any:
    """Curvature along each gate from one batch, in inference mode.

    Args:
        gated: The gated network, its gates neither held open nor settled.
        layers: Its gate layers.
        x: Inputs in the structure of the model's inputs.
        mean_losses: Maps the model's outputs to losses, averaged over the batch, whose Fishers
            add up.
        factored: Whether the curvature is Kronecker-factored.

    Returns:
        Tensor of shape `(num_gates,)`, float32.
    """
    logits = [source.logits for source in gated.sources]
    with tf.GradientTape(persistent=True) as tape:
        outputs, records = capture(gated.net, x, layers, training=False)
        batch = tf.shape(keras.tree.flatten(x)[0])[0]
        losses = [loss * tf.cast(batch, loss.dtype) for loss in mean_losses(outputs)]
    points = [record.s for record in records] + [v.value for v in logits]
    by_layer = {id(entry.layer): entry for entry in layers}
    curvature: Any = 0.0
    for loss in losses:
        found = tape.gradient(loss, points, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        per_example, kron = 0.0, 0.0
        for record, h in zip(records, found[: len(records)], strict=True):
            entry = by_layer[id(record.layer)]
            inputs = record.x[0] if isinstance(entry.layer, GateEdge) else record.x
            a = _locations(inputs, entry.layer.axis)
            h = _locations(h, entry.layer.axis)
            per_example += _by_gate(tf.reduce_sum(a * h, axis=1), entry.gates, gated.num_gates)
            q = tf.reduce_mean(tf.reduce_sum(a**2, 1), 0) * tf.reduce_mean(h**2, (0, 1))
            kron += _by_gate(q[None], entry.gates, gated.num_gates)[0]
        squares = tf.reduce_sum(tf.square(per_example), axis=0)
        total = tf.concat(found[len(records) :], axis=0)
        inside = tf.square(total) - tf.square(tf.reduce_sum(per_example, axis=0))
        b = tf.cast(batch, "float32")
        curvature += (kron if factored else squares / b) + inside / b
    return curvature


def _locations(tensor: Any, axis: int) -> Any:
    """`(batch, ..., C, ...)` as `(batch, T, C)`, float32."""
    tensor = tf.cast(tensor, "float32")
    rank = len(tensor.shape)
    order = [k for k in range(rank) if k != axis % rank] + [axis % rank]
    moved = tf.transpose(tensor, order)
    return tf.reshape(moved, [tf.shape(tensor)[0], -1, tensor.shape[axis]])


def _by_gate(per_channel: Any, gates: np.ndarray, num_gates: int) -> Any:
    """Sums channels `(batch, C)` into gates `(batch, num_gates)`."""
    summed = tf.math.unsorted_segment_sum(tf.transpose(per_channel), gates, num_gates + 1)
    return tf.transpose(summed[:num_gates])
