"""Puts gates into a model: wherever prunable neurons are read.

That is the data input of every contraction, and the inside of layers that mix channels or feed
them back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import rules as _rules  # noqa: F401  (registers the rules of gate layers)
from tf_kfacprune.gates.gate_aware import GateAware
from tf_kfacprune.gates.neuron_gate import FeatureEdge, GateBank, GateEdge
from tf_kfacprune.gates.statistic_edge import StatisticEdge
from tf_kfacprune.graph import Call, ChannelGraph, Edge, Value, analyze, fresh_operation, reasons
from tf_kfacprune.graph.calls import GATES
from tf_kfacprune.graph.selection import Selector

__all__ = ["describe_frozen", "insert_gates"]


def insert_gates(
    model: keras.Model,
    *,
    prune_inputs: bool = False,
    prune_features: bool = False,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
    kind: str = "hard_concrete",
) -> keras.Model:
    """Builds the gated version of a model.

    One `GateBank` holds the gates of all neurons; a `GateEdge` multiplies the data input of every
    Dense or convolution layer by the gates of the neurons it reads. There, a closed gate removes
    the neuron exactly, whatever came before. Where flattened features are neurons, a `FeatureEdge`
    follows: a feature has two gates, its channel's and its own. Layers that read neurons inside
    (normalizations, recurrent layers, attention) are put into a `GateAware` layer of the same name.
    With all gates open the model is unchanged, to the bit.

    Args:
        model: A built Sequential or Functional model.
        prune_inputs: Whether input features are gated too.
        prune_features: Whether flattened features, each position of each channel, are gated too.
        include: Layers that may lose neurons: names, regular expressions or layers; by default
            all.
        exclude: Layers that keep all their neurons, likewise; wins over `include`.
        kind: Kind of gate, `"hard_concrete"` or `"deterministic"`.

    Returns:
        A flat Functional model of the same layer objects (weights are shared with `model`) and
        the gates. Nested models are inlined; where two inlined layers have the same name, the
        later one is renamed after its path, with a warning if it lies in no opened layer.

    Raises:
        UnsupportedModelError: If the model is not built, is subclassed, has gates already, or
            nothing in it can be pruned.
        InvalidArgumentError: If `include`, `exclude` or `kind` is wrong.
    """
    channels = analyze(
        model,
        prune_inputs=prune_inputs,
        prune_features=prune_features,
        include=include,
        exclude=exclude,
    )
    if channels.flow.slot_sources:
        raise UnsupportedModelError(
            f"Model {model.name!r} has gates already. Insert them into the model without gates."
        )
    if not channels.num_neurons:
        raise UnsupportedModelError(
            f"Nothing can be pruned in model {model.name!r}. {describe_frozen(channels)} "
            f"{_way_out(channels)}"
        )
    return _Insertion(channels, kind).gated_model()


def describe_frozen(channels: ChannelGraph) -> str:
    """One sentence that says which channels are frozen and why, for error messages."""
    if not channels.frozen:
        return "It has no Dense or convolution layer that another one reads."
    listed = (f"{f.layer!r} ({f.channels} channels): {f.reason}" for f in channels.frozen)
    return f"Frozen: {'; '.join(listed)}."


def _way_out(channels: ChannelGraph) -> str:
    if all(record.reason == reasons.MODEL_OUTPUT for record in channels.frozen):
        return "Only neurons that a layer reads can go: put a Dense or convolution layer behind."
    return "`inspect` tells what would unfreeze them."


class _Insertion:
    def __init__(self, channels: ChannelGraph, kind: str) -> None:
        self._channels = channels
        self._names: dict[str, Any] = dict.fromkeys(channels.graph.input_names)
        self._renamed: list[str] = []
        self._twins: dict[Any, Any] = {}
        self._edges: dict[Call, list[Edge]] = {}
        self._gated: dict[tuple[Any, ...], Any] = {}
        self._kept: list[Any] = []
        self._aware: dict[Any, GateAware] = {}
        for call in channels.graph.calls:
            self._names.setdefault(call.operation.name, call.operation)
        for edge in channels.edges:
            if (edge.neurons < channels.num_neurons).any():
                self._edges.setdefault(edge.call, []).append(edge)
        self._bank = GateBank(
            [(group.name, group.size) for group in channels.groups],
            kind=kind,
            name=self._free_name("gates"),
        )
        self._gates: Sequence[Any] = ()

    def gated_model(self) -> keras.Model:
        gated = self._channels.graph.rebuild(self._call, begin=self._begin)
        if self._renamed:
            warnings.warn(
                "Layers of nested models had names that are taken in the flat gated model, and "
                f"were renamed: {', '.join(self._renamed)}.",
                stacklevel=4,
            )
        return gated

    def _begin(self, inputs: Sequence[Any]) -> None:
        self._gates = self._bank(inputs[0])

    def _call(self, call: Call, args: Any, kwargs: Any) -> Any:
        operation = self._uniquely_named(call)
        edges: dict[Any, list[Edge]] = {}
        for edge in self._edges.get(call, ()):
            edges.setdefault(edge.value, []).append(edge)
        inside = [edge for edge in self._edges.get(call, ()) if edge.value is None]

        def gate(value: Any, tensor: Any) -> Any:
            on_value = edges.get(value, ()) if isinstance(value, Value) else ()
            # A layer may read the same channels of a tensor in several roles (query, key, value).
            distinct = {(e.axis, e.neurons.tobytes(), e.statistic): e for e in on_value}
            for edge in distinct.values():
                tensor = self._gate(edge, tensor)
            return tensor

        args, kwargs = call.map_data(gate, args, kwargs)
        if not inside:
            return operation(*args, **call.without_gates(kwargs))
        if operation not in self._aware:
            indices = {edge.role: edge.neurons.tolist() for edge in inside}
            self._aware[operation] = GateAware(operation, indices)
        kwargs = {**call.without_gates(kwargs), GATES: list(self._gates)}
        return self._aware[operation](*args, **kwargs)

    def _gate(self, edge: Edge, tensor: Any) -> Any:
        key = (id(tensor), edge.axis, edge.neurons.tobytes(), edge.statistic)
        if key not in self._gated:
            name = self._free_name(f"{edge.layer.name}_gate")
            indices = edge.neurons.tolist()
            if edge.statistic is None:
                kind = FeatureEdge if edge.flattened == "features" else GateEdge
                layer = kind(indices, axis=edge.axis, name=name)
                self._gated[key] = layer([tensor, self._gates[0]])
            else:
                layer = StatisticEdge(indices, edge.axis, edge.statistic, name=name)
                self._gated[key] = layer([tensor, *self._gates])
            self._kept.append(tensor)  # so that its `id` is not used again
        return self._gated[key]

    def _uniquely_named(self, call: Call) -> Any:
        """The operation to call, renamed if another one of that name is already in the model."""
        operation = call.operation
        owner = self._names.setdefault(operation.name, operation)
        if owner is operation:
            return operation
        if operation not in self._twins:
            name = self._free_name(call.path.replace("/", "_"))
            if call.is_layer:
                if not self._is_in_opened_layer(call):
                    self._renamed.append(f"{operation.name!r} to {name!r}")
                operation.name = name
                self._twins[operation] = operation
            else:
                self._twins[operation] = fresh_operation(operation, name)
            self._names[name] = self._twins[operation]
        return self._twins[operation]

    def _is_in_opened_layer(self, call: Call) -> bool:
        parts = call.path.split("/")
        opened = self._channels.graph.opened
        return any("/".join(parts[:k]) in opened for k in range(1, len(parts)))

    def _free_name(self, name: str) -> str:
        free, number = name, 0
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names[free] = None
        return free
