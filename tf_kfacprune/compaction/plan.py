"""Which neurons stay, and what gates their readers absorb."""

from __future__ import annotations

import keras
import numpy as np

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.graph import (
    Branches,
    Call,
    ChannelGraph,
    Edge,
    Graph,
    Value,
    analyze,
    rule_for,
    trace,
)

__all__ = ["RemovalPlan"]


class RemovalPlan:
    """The neurons that stay in a gated network, read off its inference-mode gate values.

    Attributes:
        graph: The traced network.
        channels: Its channel graph.
        keep: For each neuron whether it stays: boolean, shape `(num_neurons,)`.
        gates: Values of all gates, shape `(num_gates,)`.
        branches: Residual branches that go as a whole if their deciding group is gone.

    Args:
        net: A model with gates.
        gated: Its analysis, if there is one already.
    """

    def __init__(self, net: keras.Model, gated: GatedNetwork | None) -> None:
        if gated is None:
            self.graph: Graph = trace(net)
            self.channels: ChannelGraph = analyze(self.graph, gated_only=True)
            self.gates, self.keep = np.ones(0, "float32"), np.ones(0, bool)
            self.branches = Branches(self.channels)
        else:
            self.graph, self.channels = gated.graph, gated.channels
            self.gates = gated.gate_values()
            self.keep = gated.kept_neurons()
            self.branches = gated.cost.branches
        self._gone = self.branches.gone(self.keep)
        self._keep_with_constant = np.append(self.keep, True)
        self._gate_with_constant = np.append(self.gates, np.float32(1.0))
        self._scales: dict[tuple[keras.Layer, str], np.ndarray] = {}
        self._unfolded: dict[tuple[Call, Value], list[Edge]] = {}
        above: np.ndarray | float = 1.0
        for edge in self.channels.edges:
            if edge.statistic is not None:
                continue  # taken over the channels that are present, whatever their gates
            scale = self._gate_with_constant[edge.slots]
            if edge.value is not None and not _is_folded(edge):
                self._unfolded.setdefault((edge.call, edge.value), []).append(edge)
            elif edge.flattened == "channels":  # the edge of their features is the next one
                above = scale
            else:
                self._add_scale(edge, scale * above if edge.flattened else scale)

    @property
    def is_wholly_folded(self) -> bool:
        """Whether weights absorb all gates that are neither open nor closed."""
        return not any(self.unfolded(*place) for place in self._unfolded)

    def positions(self, neurons: np.ndarray) -> np.ndarray:
        """The positions that stay on an axis, given the neuron at each position."""
        return np.flatnonzero(self._keep_with_constant[neurons])

    def is_cut(self, call: Call) -> bool:
        """Whether a contraction reads nothing any more and puts out a constant."""
        return self.branches.cuts.get(call) in self._gone

    def is_constant(self, value: Value) -> bool:
        """Whether a tensor is the same for every example and at every position."""
        return self.branches.constants.get(value) in self._gone

    def is_needed(self, call: Call) -> bool:
        """Whether something that stays depends on a call."""
        return not self.branches.killers(call) & self._gone

    def scale(self, layer: keras.Layer, role: str) -> np.ndarray | None:
        """The gate values on an input of a contraction layer, or None if it is not tracked."""
        return self._scales.get((layer, role))

    @property
    def readers(self) -> list[keras.Layer]:
        """The layers that read through gates."""
        return list(dict.fromkeys(layer for layer, _ in self._scales))

    def is_scaled(self, layer: keras.Layer) -> bool:
        """Whether a layer absorbs a gate that is not fully open."""
        return any((z != 1).any() for (reader, _), z in self._scales.items() if reader is layer)

    def unfolded(self, call: Call, value: Value) -> list[tuple[int, np.ndarray]]:
        """Gates on a tensor that no weight of the reader absorbs: axes, and what is left of them.

        Those of products of two tensors, and of layers that use one weight for two purposes.
        """
        found = []
        for edge in self._unfolded.get((call, value), ()):
            scale = self._gate_with_constant[edge.slots][self.positions(edge.neurons)]
            if (scale != 1).any():
                found.append((edge.axis, scale))
        return found

    def shape(self, value: Value) -> tuple[int | None, ...]:
        """The shape of a tensor once channels are gone."""
        axes = self.channels.axes(value)
        return tuple(
            size if neurons is None else len(self.positions(neurons))
            for size, neurons in zip(value.shape, axes, strict=True)
        )

    def kept(self, value: Value, axis: int) -> np.ndarray | None:
        """The positions that stay on an axis of a tensor, or None if nothing goes there."""
        neurons = self.channels.axes(value)[axis]
        return None if neurons is None else self.positions(neurons)

    def _add_scale(self, edge: Edge, scale: np.ndarray) -> None:
        known = self._scales.setdefault((edge.layer, edge.role), scale)
        if not np.array_equal(known, scale):
            raise UnsupportedModelError(
                f"Layer {edge.call.path!r} is shared, and its calls read through gates of "
                "different values, which one set of weights cannot absorb. Share the gate too, or "
                "use one layer per call."
            )


def _is_folded(edge: Edge) -> bool:
    """Whether a weight of the reader absorbs the gates of an edge."""
    if not isinstance(edge.layer, keras.Layer):
        return False
    rule = rule_for(edge.layer)
    return any(edge.role in rule.folded_roles(name) for name in rule.weight_roles(edge.layer))
