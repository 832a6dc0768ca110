"""Analysis of a model that contains gates, whether they were inserted or placed by hand."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates.gate_source import GateSource
from tf_kfacprune.gates.insertion import describe_frozen
from tf_kfacprune.gates.neuron_gate import GateEdge
from tf_kfacprune.gates.statistic_edge import StatisticEdge
from tf_kfacprune.graph import ChannelGraph, CostModel, Graph, LatencyTable, analyze, trace_opened
from tf_kfacprune.graph.labels import NO_SLOT

__all__ = ["GatedNetwork"]


class GatedNetwork:
    """What the gates of a model control, and what the model costs as they close.

    A neuron can be removed if every contraction that reads it is gated; it is removed when all
    gates on these edges are closed (there is more than one only in models built by hand).

    Attributes:
        net: The gated model.
        graph: Its traced graph.
        channels: Its channel graph; gate layers pass channels through.
        cost: Its cost without the gates, relative to all gates open.
        sources: The layers that own gates, in the order of their first call.
        num_gates: Number of gates of all sources together.
        neuron_gates: The gates that close each neuron, numbered over all sources in order:
            integer array of shape `(num_neurons, k)`, rows padded by repetition.

    Args:
        net: A model with gates.
        latency_table: Measured times of its layers, to be able to bound the latency, or None.

    Raises:
        UnsupportedModelError: If the model has no gates, none of them can remove anything, or one
            is placed where closing it would not remove a channel exactly.
    """

    def __init__(self, net: keras.Model, latency_table: LatencyTable | None = None) -> None:
        self.net = net
        self.graph: Graph = trace_opened(net)
        self.channels: ChannelGraph = analyze(self.graph, prune_inputs=True, gated_only=True)
        slots = self.channels.flow.slot_sources
        self.sources: list[GateSource] = sorted(slots, key=lambda source: slots[source])
        self.num_gates = self.channels.flow.num_slots
        if not self.sources:
            raise UnsupportedModelError(
                f"Model {net.name!r} has no gates. Insert them with insert_gates(model), or build "
                "it with gated layers such as GatedDense."
            )
        if not self.channels.num_neurons:
            raise UnsupportedModelError(
                f"No gate of model {net.name!r} can remove anything. "
                f"{describe_frozen(self.channels)}"
            )
        gates = [
            call.operation
            for call in self.graph.calls
            if isinstance(call.operation, GateSource | GateEdge | StatisticEdge)
        ]
        self.cost = CostModel(self.channels, gates, latency_table)
        self.neuron_gates = self._gates_by_neuron()

    def openness(self, gate_vector: Any) -> Any:
        """How open each neuron is: as open as the most open of its gates; differentiable.

        Args:
            gate_vector: Tensor of shape `(num_gates,)`: values or probabilities of all sources.

        Returns:
            Tensor of shape `(num_neurons,)`.
        """
        gates = ops.take(gate_vector, self.neuron_gates, axis=0)
        return gates[:, 0] if self.neuron_gates.shape[1] == 1 else ops.max(gates, axis=1)

    def gate_values(self) -> np.ndarray:
        """Inference-mode values of all gates, shape `(num_gates,)`."""
        values = [ops.convert_to_numpy(source.deterministic_values()) for source in self.sources]
        return np.concatenate(values)

    def kept_neurons(self) -> np.ndarray:
        """Which neurons stay when the network is compacted now: boolean, `(num_neurons,)`.

        Where all neurons of a group are closed, the one most likely to be open stays: a layer
        keeps at least one. Only a residual branch may go as a whole. A channel of which only
        flattened features are read stays if one of them does, and each of them if it does.
        """
        keep = ops.convert_to_numpy(self.openness(ops.convert_to_tensor(self.gate_values()))) > 0
        probability = ops.concatenate([source.open_probability() for source in self.sources])
        probability = ops.convert_to_numpy(self.openness(probability))
        for number, group in enumerate(self.channels.groups):
            members = slice(group.start, group.start + group.size)
            if not keep[members].any() and number not in self.cost.branches.removable:
                keep[group.start + np.argmax(probability[members])] = True
        keep = self.channels.features.completed(keep, self.channels.groups, probability)
        return self.cost.branches.without_branches(keep)

    def _gates_by_neuron(self) -> np.ndarray:
        pairs = [np.stack([edge.neurons, edge.slots], axis=1) for edge in self.channels.edges]
        neuron, slot = np.unique(np.concatenate(pairs), axis=0).T
        counts_only = (neuron < self.channels.num_neurons) & (slot != NO_SLOT)
        neuron, slot = neuron[counts_only], slot[counts_only]
        counts = np.bincount(neuron, minlength=self.channels.num_neurons)
        starts = np.cumsum(counts) - counts
        column = np.minimum(np.arange(counts.max())[None, :], counts[:, None] - 1)
        return slot[starts[:, None] + column].astype("int32")
