"""The channel graph of a model: its neurons, how they are grouped, and where each one is read.

A *neuron* is a set of coupled channels that can only go together, across all layers and tensors
they appear in. Neurons with the same producers form a *group*, numbered contiguously.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import keras
import numpy as np

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.components import connected_components
from tf_kfacprune.graph.features import Features
from tf_kfacprune.graph.labels import NO_SLOT, LabelFlow, Producer
from tf_kfacprune.graph.opening import trace_opened
from tf_kfacprune.graph.rules import ChannelRule, ContractionRule, rule_for
from tf_kfacprune.graph.rules.reshaping import IndexRule
from tf_kfacprune.graph.selection import Selection, Selector
from tf_kfacprune.graph.tracer import Graph
from tf_kfacprune.validation import require

__all__ = ["ChannelGraph", "Edge", "Frozen", "NeuronGroup", "analyze"]


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons created by the same layers.

    Attributes:
        name: Name of the group: of its first producer, with a suffix if that is taken.
        start: Number of the first neuron.
        size: Number of neurons.
        producers: Names (paths) of the layers or inputs that create the neurons.
        consumers: Names (paths) of the layers that read them.
    """

    name: str
    start: int
    size: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def neurons(self) -> range:
        """Numbers of the group's neurons."""
        return range(self.start, self.start + self.size)


@dataclass(frozen=True, eq=False)
class Edge:
    """Channels that one call of a layer reads: a contraction's data input, or inside the layer.

    Attributes:
        call: The call.
        layer: The layer.
        role: What the layer's weights call the channels that are read, `"in"` for most.
        value: The tensor that is read, None for channels that are read inside the layer.
        axis: The channel axis of the tensor, -1 for channels that are read inside the layer.
        neurons: Neuron at each position; `num_neurons` where nothing can be removed.
        slots: In a gated model, the gate that each position has passed; -1 where none.
        statistic: What an operation takes over the channels: `"sum"`, `"mean"`, `"variance"`,
            `"max"`, `"min"`, `"any"`, `"all"`; None for a contraction.
        flattened: `"features"` where the neurons are entries of flattened channels, `"channels"`
            where they are these channels, of which each entry is a neuron, too; else None.
    """

    call: Call
    layer: keras.Layer
    role: str
    value: Value | None
    axis: int
    neurons: np.ndarray
    slots: np.ndarray
    statistic: str | None = None
    flattened: str | None = None


@dataclass(frozen=True)
class Frozen:
    """Channels that cannot be removed.

    Attributes:
        layer: Name (path) of the layer or input that creates them.
        channels: How many.
        reason: One of the constants in `tf_kfacprune.graph.reasons`.
        where: Name (path) of the call that froze them.
    """

    layer: str
    channels: int
    reason: str
    where: str


class ChannelGraph:
    """Neurons, groups and edges of a traced model; made by `analyze`.

    Attributes:
        graph: The traced model.
        flow: The labels it was resolved from.
        groups: Groups of neurons, contiguous, in the order of their first producers.
        num_neurons: Number of neurons that can be removed.
        features: Which neurons are flattened features, and of which channels.
        edges: All places where tracked channels are read, in order.
        frozen: Channels that cannot be removed, with reasons.
    """

    def __init__(self, graph: Graph, flow: LabelFlow) -> None:
        self.graph = graph
        self.flow = flow
        self._component = connected_components(flow.size, flow.pairs)
        why = self._why_frozen()
        partition = self._partition(why)
        self._neuron_of_label, groups = self._number(partition)
        self.num_neurons = sum(len(roots) for roots in groups)
        self.edges = [
            Edge(
                call=r.call,
                layer=r.call.operation,
                role=r.role,
                value=r.value,
                axis=r.axis,
                neurons=self.neurons(r.labels),
                slots=r.slots,
                statistic=r.statistic,
                flattened=r.flattened,
            )
            for r in flow.readings
        ]
        self.features = self._features()
        self.groups = self._describe(groups)
        self.frozen = self._frozen(why)

    def neurons(self, labels: np.ndarray) -> np.ndarray:
        """The neuron behind each label; `num_neurons` where nothing can be removed."""
        return self._neuron_of_label[self.flow.base(labels)]

    @property
    def picked(self) -> list[Producer]:
        """What readers pick the ones that stay of: input features and flattened features."""
        return [
            producer
            for producer in self.flow.picked
            if (self.neurons(producer.labels) < self.num_neurons).any()
        ]

    def roles(self, layer: keras.Layer) -> dict[str, np.ndarray]:
        """The neurons that a layer's weight axes hold, by role; only tracked roles."""
        named = self.flow.roles(layer)
        return {role: self.neurons(labels) for role, labels in named.items() if labels is not None}

    def axes(self, value: Value) -> list[np.ndarray | None]:
        """The neurons along each axis of a tensor; None where nothing is tracked."""
        tracked = self.flow.axes[value]
        return [None if labels is None else self.neurons(labels) for labels in tracked]

    def _why_frozen(self) -> np.ndarray:
        """For each component root the number of the event that froze it first, or -1."""
        flow = self.flow
        why = np.full(flow.size, -1)
        for number, event in enumerate(flow.freezes):
            roots = self._component[event.labels]
            why[roots] = np.where(why[roots] < 0, number, why[roots])
        return why

    def _partition(self, why: np.ndarray) -> np.ndarray:
        """For each free component root a key shared exactly by roots with equal producers."""
        key = np.zeros(self.flow.size, int)
        for labels in [*(p.labels for p in self.flow.producers), *self.flow.parts]:
            roots = np.unique(self._component[labels])
            roots = roots[why[roots] < 0]
            _, inverse = np.unique(key[roots], return_inverse=True)
            key[roots] = key.max() + 1 + inverse
        return key

    def _number(self, key: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Numbers the neurons group by group, in the order of their first producers."""
        groups: list[np.ndarray] = []
        seen: set[int] = set()
        for producer in self.flow.producers:
            roots = self._component[producer.labels]
            _, first = np.unique(roots, return_index=True)
            roots = roots[np.sort(first)]
            for group in dict.fromkeys(key[roots].tolist()):
                if group and group not in seen:
                    seen.add(group)
                    groups.append(roots[key[roots] == group])
        groups = [roots for roots in groups if len(roots) > 1]
        count = sum(map(len, groups))
        of_root = np.full(self.flow.size, count)
        if groups:
            of_root[np.concatenate(groups)] = np.arange(count)
        return of_root[self._component], groups

    def _features(self) -> Features:
        pairs = [np.stack([self.neurons(f), self.neurons(c)]) for f, c in self.flow.features]
        read = [edge.neurons for edge in self.edges if edge.flattened != "channels"]
        return Features(self.num_neurons, pairs, read)

    def _describe(self, groups: Sequence[np.ndarray]) -> list[NeuronGroup]:
        starts = np.cumsum([0, *map(len, groups)])
        group_of_neuron = np.repeat(np.arange(len(groups)), np.diff(starts))
        producers = self._members(
            group_of_neuron, [(p.name, self.neurons(p.labels)) for p in self.flow.producers]
        )
        consumers = self._members(group_of_neuron, [(e.call.path, e.neurons) for e in self.edges])
        described: list[NeuronGroup] = []
        taken: dict[str, int] = {}
        for number, roots in enumerate(groups):
            name = producers[number][0]
            taken[name] = taken.get(name, 0) + 1
            described.append(
                NeuronGroup(
                    name=name if taken[name] == 1 else f"{name}:{taken[name]}",
                    start=int(starts[number]),
                    size=len(roots),
                    producers=producers[number],
                    consumers=consumers[number],
                )
            )
        return described

    def _members(
        self, group_of_neuron: np.ndarray, named: Iterable[tuple[str, np.ndarray]]
    ) -> dict[int, tuple[str, ...]]:
        members: dict[int, dict[str, None]] = {}
        for name, neurons in named:
            for group in np.unique(group_of_neuron[neurons[neurons < self.num_neurons]]):
                members.setdefault(int(group), {})[name] = None
        return {group: tuple(names) for group, names in members.items()}

    def _frozen(self, why: np.ndarray) -> list[Frozen]:
        frozen: list[Frozen] = []
        for producer in self.flow.producers:
            closed = producer.labels[self.neurons(producer.labels) == self.num_neurons]
            events, counts = np.unique(why[self._component[closed]], return_counts=True)
            for event, count in zip(events.tolist(), counts.tolist(), strict=True):
                reason = reasons.ONLY_NEURON if count == 1 else reasons.ALL_COUPLED
                where = producer.name
                if event >= 0:
                    reason, where = self.flow.freezes[event].reason, self.flow.freezes[event].where
                frozen.append(Frozen(producer.name, count, reason, where))
        return frozen


def analyze(
    model: keras.Model | Graph,
    *,
    prune_inputs: bool = False,
    prune_features: bool = False,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
    gated_only: bool = False,
) -> ChannelGraph:
    """Finds out which neurons of a model can be removed, and what goes with each of them.

    Args:
        model: A Sequential or Functional model, or its traced graph.
        prune_inputs: Whether input features may be removed too.
        prune_features: Whether flattened features may be removed one by one.
        include: Layers that may lose neurons: names, regular expressions (matched against the
            whole name, or that of a nested model) or layer objects. By default, all.
        exclude: Layers that keep all their neurons, likewise; wins over `include`.
        gated_only: Whether only neurons count whose every reading edge is gated.

    Returns:
        The channel graph.

    Raises:
        UnsupportedModelError: If the model cannot be traced, or holds a gate where closing it
            would not remove a channel.
        InvalidArgumentError: If `include` or `exclude` names a layer that does not exist, or
            `prune_inputs` or `prune_features` is neither True nor False.
    """
    for name, flag in (("prune_inputs", prune_inputs), ("prune_features", prune_features)):
        require("analyze", isinstance(flag, bool), name, "True or False", flag)
    graph = model if isinstance(model, Graph) else trace_opened(model)
    selection = Selection(graph, include, exclude)
    flow = LabelFlow(graph, prune_inputs, prune_features, selection.why_left_out)
    for call in graph.calls:
        rule = rule_for(call.operation)
        _refuse_misplaced_gate(call, rule, flow)
        for value, axes in zip(call.outputs, rule.propagate(call, flow), strict=True):
            flow.axes[value] = axes
        _mark_raw(call, rule, flow)
        _mark_flattened(call, rule, flow)
    for value in graph.outputs:
        flow.freeze_value(value, reasons.MODEL_OUTPUT, "model output")
    for reading in flow.readings if gated_only else ():
        ungated = reading.labels[reading.slots == NO_SLOT]
        flow.freeze(ungated, reasons.NOT_GATED, reading.call.path)
    _freeze_unread(flow)
    if prune_features:
        _freeze_unpicked(flow)
        _warn_of_no_features(flow)
    return ChannelGraph(graph, flow)


def _mark_raw(call: Call, rule: ChannelRule, flow: LabelFlow) -> None:
    """Values computed from inputs alone, without a contraction, are input features too."""
    is_weight = any(value in flow.own_weights for value in call.outputs)
    if isinstance(rule, ContractionRule) or is_weight or not call.inputs:
        return
    if all(value in flow.raw for value in call.inputs):
        flow.raw.update(dict.fromkeys(call.outputs, flow.raw[call.inputs[0]]))


def _mark_flattened(call: Call, rule: ChannelRule, flow: LabelFlow) -> None:
    """Vectors of which a channel has several entries: those that a reshape makes of its map."""
    value, *others = call.outputs
    if others or len(value.shape) != 2 or not call.inputs:
        return
    labels = flow.axes[value][1]
    if labels is None or len(np.unique(flow.base(labels))) == len(labels):
        return
    if isinstance(rule, IndexRule) and len(call.inputs[0].shape) > 2:
        flow.flattened[value] = ((call,), labels)
    elif not isinstance(rule, ContractionRule):
        before = [flow.flattened[read][0] for read in call.inputs if read in flow.flattened]
        if before:
            flow.flattened[value] = (tuple(dict.fromkeys(chain(*before))), labels)


def _freeze_unpicked(flow: LabelFlow) -> None:
    """Lists flattened features that are no neurons, with the reason."""
    values = (value for _, value in flow.selections if value in flow.flattened)
    picked = {maker for value in values for maker in flow.flattened[value][0]}
    why: dict[Call, str] = {}
    for value, (makers, _) in flow.flattened.items():
        for maker in makers:
            why[maker] = why.get(maker) or flow.why_whole(value) or ""
    for maker, left_out in why.items():
        if maker not in picked:
            labels = flow.fresh(maker.outputs[0].shape[1] or 0, maker.path, maker.operation)
            flow.freeze(labels, left_out or reasons.NOT_READ_BY_DENSE, maker.path)


def _warn_of_no_features(flow: LabelFlow) -> None:
    if not flow.flattened:
        warnings.warn(
            f"prune_features=True changes nothing in model {flow.graph.model.name!r}: it makes no "
            "vectors of the maps of its channels by Flatten or a reshape, of shape (batch, "
            "features) each.",
            stacklevel=4,
        )


def _freeze_unread(flow: LabelFlow) -> None:
    component = connected_components(flow.size, flow.pairs)
    is_read = np.zeros(flow.size, bool)
    for reading in flow.readings:
        is_read[component[reading.labels]] = True
    for producer in flow.producers:
        unread = producer.labels[~is_read[component[producer.labels]]]
        flow.freeze(unread, reasons.NOT_READ, producer.name)


def _refuse_misplaced_gate(call: Call, rule: ChannelRule, flow: LabelFlow) -> None:
    gated = [value for value in call.inputs if flow.is_gated(value)]
    if not gated or rule.is_homogeneous(call):
        return
    read = rule.read_axes(call)
    others = [
        labels
        for value in gated
        for k, labels in enumerate(flow.of(value))
        if k not in read.get(value, set()) and labels is not None
    ]
    if read and all((flow.slots(labels) == NO_SLOT).all() for labels in others):
        return
    kind = type(call.operation).__name__
    raise UnsupportedModelError(
        f"Gate {flow.gate_name(gated[0])!r} stands in front of {call.path!r} ({kind}), behind "
        "which a closed channel is not "
        "zero any more or is mixed with others, so it could not be removed exactly. Place the "
        "gate on the data input of the Dense or convolution layer that reads the channel."
    )
