"""Channel labels: which positions of which tensors live and die together.

Every tensor carries, per axis, an integer label array (one label per position) or None where
nothing can be removed. Rules make fresh labels where a layer creates channels, hand them on where
an operation treats channels one by one, unite them where channels are coupled, and freeze them
where removal would not be exact. Nothing is resolved until all calls are done.

A *gated* label stands for a channel that has been multiplied by a gate: it remembers the channel
(`base`) and the gate (`slot`), and travels like any label until a contraction reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import GATES, Call, Value
from tf_kfacprune.graph.tracer import Graph

__all__ = ["CONSTANT", "NO_SLOT", "Axes", "Freeze", "LabelFlow", "Producer", "Reading"]

Labels = np.ndarray
Axes = list[Labels | None]
CONSTANT = 0  # the label of positions that are always there
NO_SLOT = -1
# Images, and sequences; the longer ones for networks that read sound, sample by sample.
ASSUMED_IMAGE_SIZE, ASSUMED_LENGTHS = 224, (128, 1024, 16384)


@dataclass(frozen=True, eq=False)
class Producer:
    """A layer (or model input) that creates channels, with their labels in order."""

    name: str
    layer: Any  # None for a model input
    labels: Labels


@dataclass(frozen=True, eq=False)
class Reading:
    """A layer reading channels: labels and gate slots per position.

    A contraction reads along one axis of a value, and so does a `statistic` over channels. What
    a layer reads inside, where no gate can stand, has neither: it is gated by the gate-aware layer
    around it. What is `flattened` is read twice: its `"features"`, and under them its `"channels"`.
    """

    call: Call
    role: str
    value: Value | None
    axis: int
    labels: Labels
    slots: np.ndarray
    statistic: str | None = None
    flattened: str | None = None


@dataclass(frozen=True, eq=False)
class Freeze:
    """An event that froze channels: where and why."""

    labels: Labels
    reason: str
    where: str


class LabelFlow:
    """State of the label propagation, and the vocabulary in which rules are written.

    Attributes:
        graph: The traced graph.
        axes: Labels of every value seen so far, one entry per axis.
        producers: Creators of channels, in order.
        parts: Labels that must not lose all their neurons, beside those of the producers.
        readings: Where channels are read: contraction edges, and inside of layers; in order.
        selections: For a call and one of its inputs: axis and labels of the input features or
            flattened features that the call reads; others can be cut off right before it.
        features: For each tensor of which flattened features are picked, the labels of its entries
            and those of the channels that features are entries of, which have passed the channels'
            gates; an entry that is no feature has its own label, and `CONSTANT` for a channel.
        flattened: Values of two axes whose entries are positions of channels, with the calls that
            flattened them and the labels of the channels.
        picked: Input features and flattened features, with the labels of the whole tensor out of
            which readers pick those that stay.
        slot_sources: First gate number of every gate source.
        slot_origin: First gate number behind a value that holds a vector of gates.
        num_slots: Number of gates met so far.
        raw: Values computed from inputs alone, with the name of the input.
        own_weights: Values that are weights of opened layers, with the calls that read them.
        statistic_edges: Values behind a `StatisticEdge`.
        uniform: Values all entries of which are the same, whatever the data.
    """

    def __init__(
        self,
        graph: Graph,
        prune_inputs: bool = False,
        prune_features: bool = False,
        why_left_out: Callable[[str, Any], str | None] = lambda name, layer: None,
    ) -> None:
        self.graph = graph
        self.axes: dict[Value, Axes] = {}
        self.producers: list[Producer] = []
        self.readings: list[Reading] = []
        self.selections: dict[tuple[Call, Value], tuple[int, Labels]] = {}
        self.features: list[tuple[Labels, Labels]] = []
        self.flattened: dict[Value, tuple[tuple[Call, ...], Labels]] = {}
        self.picked: list[Producer] = []
        self.parts: list[Labels] = []
        self.freezes: list[Freeze] = []
        self.slot_origin: dict[Value, int] = {}
        self.slot_sources: dict[Any, int] = {}
        self.num_slots = 0
        self.raw: dict[Value, str] = {}
        self.own_weights: dict[Value, Call] = {}
        self.uniform: set[Value] = set()
        self.statistic_edges: set[Value] = set()
        self.size = 1
        self._sizes: dict[Value, tuple[int | None, ...]] = {}
        self._prune_inputs = prune_inputs
        self._prune_features = prune_features
        self._why_left_out = why_left_out
        self._picked: dict[tuple[Value, int], Labels] = {}
        self._roles: dict[Any, dict[str, Labels | None]] = {}
        self._pairs: list[np.ndarray] = []
        self._base = np.zeros(1, int)
        self._slot = np.full(1, NO_SLOT)
        self.freezes.append(Freeze(np.zeros(1, int), reasons.UNTRACKED_OPERAND, "constants"))
        for value, name in zip(graph.inputs, graph.input_names, strict=True):
            self.axes[value] = [None] * len(value.shape)
            self.raw[value] = name

    def sizes(self, value: Value) -> tuple[int | None, ...]:
        """The shape of a value, with plain assumptions for axes of unknown size.

        Costs of models for images or texts of any size are stated for one size.
        """
        if not self._sizes:
            graph, shapes = self.graph, (v.shape for v in self.graph.inputs)
            if any(None in shape[1:] for shape in shapes):
                graph = _of_assumed_size(graph)
            known = [*self.graph.inputs, *(v for call in self.graph.calls for v in call.outputs)]
            sized = [*graph.inputs, *(v for call in graph.calls for v in call.outputs)]
            self._sizes = {a: b.shape for a, b in zip(known, sized, strict=True)}
        return self._sizes.get(value, value.shape)

    # ---- making labels

    def fresh(self, size: int, name: str, layer: Any, part: str = "") -> Labels:
        """New channels, created by (a part of) a layer, or by a model input: `layer=None`."""
        labels = self._allocate(np.arange(self.size, self.size + size), NO_SLOT)
        self.producers.append(Producer(f"{name}:{part}" if part else name, layer, labels))
        reason = self._why_left_out(name, layer)
        if reason is not None:
            self.freeze(labels, reason, name)
        return labels

    def gated(self, labels: Labels, slots: np.ndarray) -> Labels:
        """Labels of the same channels behind gates; `NO_SLOT` where there is no gate."""
        twice = (self._slot[labels] != NO_SLOT) & (slots != NO_SLOT)
        if twice.any():
            raise UnsupportedModelError(
                "A channel passes two gates before one contraction. Keep one gate per edge."
            )
        has_slot = slots != NO_SLOT
        derived = np.array(labels)
        derived[has_slot] = self._allocate(labels[has_slot], slots[has_slot])
        return derived

    def open_slots(self, source: Any, size: int) -> int:
        """The number of the first gate of a gate source; the same in all its calls."""
        if source not in self.slot_sources:
            self.slot_sources[source] = self.num_slots
            self.num_slots += size
        return self.slot_sources[source]

    def _allocate(self, base: np.ndarray, slot: np.ndarray | int) -> Labels:
        labels = np.arange(self.size, self.size + len(base))
        self._base = np.concatenate([self._base, base])
        self._slot = np.concatenate([self._slot, np.broadcast_to(slot, base.shape)])
        self.size += len(base)
        return labels

    def separate(self, labels: Labels) -> None:
        """Makes some of a layer's channels groups of their own, which keep at least one neuron."""
        self.parts.append(self.base(labels))

    # ---- reading labels

    def of(self, value: Value) -> Axes:
        """The labels of a value, per axis (a copy of the list)."""
        return list(self.axes[value])

    def base(self, labels: Labels) -> Labels:
        """The channels behind labels, gated or not."""
        return self._base[labels]

    def slots(self, labels: Labels) -> np.ndarray:
        """The gates that labels have passed, `NO_SLOT` where none."""
        return self._slot[labels]

    def is_gated(self, value: Value) -> bool:
        """Whether some channel of a value has passed a gate."""
        axes = (labels for labels in self.axes[value] if labels is not None)
        return any((self._slot[labels] != NO_SLOT).any() for labels in axes)

    def gate_name(self, value: Value) -> str:
        """The name of the layer that owns the first gate that a value has passed."""
        tracked = [labels for labels in self.axes[value] if labels is not None]
        slot = max(int(self._slot[labels].max()) for labels in tracked)
        owners = [(start, layer) for layer, start in self.slot_sources.items() if start <= slot]
        return max(owners, key=lambda owner: owner[0])[1].name

    def select(self, call: Call, value: Value, axis: int) -> Labels | None:
        """Labels of one axis; for input features, made here if inputs are prunable."""
        labels = self.axes[value][axis]
        size = value.shape[axis]
        if labels is not None or not self._prune_inputs or value not in self.raw or not size:
            return labels
        if (value, axis) not in self._picked:
            self._picked[value, axis] = self.fresh(size, self.raw[value], None)
            self.picked.append(self.producers[-1])
        labels = self._picked[value, axis]
        self.selections[call, value] = (axis, labels)
        return labels

    def read(self, call: Call, value: Value, axis: int, role: str = "in") -> Labels | None:
        """Labels that a contraction reads, known to its weights by `role`; records the edge."""
        labels = self.select(call, value, axis)
        if labels is not None:
            slots = self.slots(labels)
            labels = self.base(labels)
            self.readings.append(Reading(call, role, value, axis, labels, slots))
        return labels

    def read_flattened(self, call: Call, value: Value, role: str = "in") -> Labels | None:
        """As `read`, of the last axis; entries of flattened channels one by one, if prunable."""
        axis = len(value.shape) - 1
        labels = self.axes[value][axis]
        if value in self.flattened and self._may_pick(call, value):
            labels = self.pick_features(call, value)
        entries = np.zeros(0, int) if labels is None else self.base(labels)
        known = (channels for f, channels in self.features if np.array_equal(f, entries))
        channels = next(known, None)
        if labels is None or channels is None:
            return self.read(call, value, axis, role)
        for part, read in (("channels", channels), ("features", labels)):
            reading = Reading(call, role, value, axis, self.base(read), self.slots(read))
            self.readings.append(replace(reading, flattened=part))
        return entries

    def _may_pick(self, call: Call, value: Value) -> bool:
        """Whether a call may pick single entries of flattened channels.

        A layer that is called more than once reads whole channels: in its other calls, entries may
        be of other ones.
        """
        calls = sum(other.operation is call.operation for other in self.graph.calls)
        return self._prune_features and calls == 1 and self.why_whole(value) is None

    def why_whole(self, value: Value) -> str | None:
        """Why the caller's choice keeps flattened features together, or None."""
        makers, _ = self.flattened[value]
        why = (self._why_left_out(maker.path, maker.operation) for maker in makers)
        return next((reason for reason in why if reason is not None), None)

    def pick_features(self, call: Call, value: Value) -> Labels:
        """Labels of a tensor's entries, of which a call picks those that stay.

        The entries of flattened channels are new neurons, made by all layers that flattened some of
        them. Others (units or input features that were concatenated) are what they were.
        """
        axis = len(value.shape) - 1
        if (value, axis) not in self._picked:
            makers, channels = self.flattened[value]
            labels = self.base(channels).copy()
            _, entry, counts = np.unique(labels, return_inverse=True, return_counts=True)
            is_feature = (counts[entry] > 1) & (labels != CONSTANT)
            first, *others = makers
            labels[is_feature] = self.fresh(is_feature.sum(), first.path, first.operation)
            for maker in others:
                also = replace(self.producers[-1], name=maker.path, layer=maker.operation)
                self.producers.append(also)
            self._picked[value, axis] = labels
            self.picked.append(Producer(first.path, first.operation, labels))
            self.features.append((labels, np.where(is_feature, channels, CONSTANT)))
        self.selections[call, value] = (axis, self._picked[value, axis])
        return self._picked[value, axis]

    def read_statistic(self, call: Call, value: Value, axis: int, statistic: str) -> None:
        """Channels over which an operation takes a statistic.

        Args:
            call: The call.
            value: Its data.
            axis: The channel axis.
            statistic: `"sum"`, `"mean"`, `"variance"`, `"max"`, `"min"`, `"any"` or `"all"`; see
                `StatisticEdge`.

        Raises:
            UnsupportedModelError: If an ordinary gate stands in front, whose closed channels would
                be counted.
        """
        labels = self.axes[value][axis]
        if labels is None:
            return
        slots = self.slots(labels)
        if value not in self.statistic_edges and (slots != NO_SLOT).any():
            raise UnsupportedModelError(
                f"Gate {self.gate_name(value)!r} stands in front of {call.path!r}, which would "
                "count closed channels as zeros. Place the gate on the data input of the next "
                "Dense or convolution layer."
            )
        labels = self.base(labels)
        self.readings.append(Reading(call, "in", value, axis, labels, slots, statistic))

    def read_inside(self, call: Call, role: str, labels: Labels | None) -> None:
        """Channels that a layer reads inside, where no gate can stand on an edge.

        The layer's rule must say with `call_gated` how to call it when some of them are closed.
        """
        if labels is None:
            return
        slots = np.full(labels.shape, NO_SLOT)
        if call.runner is not None and role in call.runner.indices:
            indices, bank = call.runner.indices[role], call.kwargs[GATES][0]
            is_gate = indices < (bank.shape[0] or 0)
            slots = np.where(is_gate, self.slot_origin[bank] + indices, NO_SLOT)
        self.readings.append(Reading(call, role, None, -1, self.base(labels), slots))

    # ---- relating labels

    def unite(self, first: Labels | None, second: Labels | None, where: str) -> Labels | None:
        """Couples channels position by position; if one side is untracked, freezes the other."""
        if first is None or second is None:
            self.freeze(first, reasons.UNTRACKED_OPERAND, where)
            self.freeze(second, reasons.UNTRACKED_OPERAND, where)
            return None
        if not np.array_equal(self.slots(first), self.slots(second)):
            raise UnsupportedModelError(
                f"Tensors that have passed different gates meet in {where!r}, so closing a gate "
                "does not remove a channel there. Place the gate on the data input of the next "
                "Dense or convolution layer instead."
            )
        self._pairs.append(np.stack([self.base(first), self.base(second)], axis=1))
        return first

    def freeze(self, labels: Labels | None, reason: str, where: str) -> None:
        """Forbids the removal of channels."""
        if labels is not None and labels.size:
            self.freezes.append(Freeze(self.base(labels), reason, where))

    def freeze_value(self, value: Value, reason: str, where: str) -> None:
        """Forbids the removal of channels on every axis of a value."""
        for labels in self.axes[value]:
            self.freeze(labels, reason, where)

    @property
    def pairs(self) -> np.ndarray:
        """All coupled pairs, shape `(num_pairs, 2)`."""
        return np.concatenate([np.zeros((0, 2), int), *self._pairs])

    # ---- what layers remember of their channels

    def role(self, layer: Any, name: str, labels: Labels | None, where: str) -> Labels | None:
        """Names the labels that a layer's weights refer to.

        A second call of a shared layer is coupled with the first.
        """
        roles = self._roles.setdefault(layer, {})
        labels = None if labels is None else self.base(labels)
        if name not in roles:
            roles[name] = labels
        elif roles[name] is not labels:
            roles[name] = self.unite(roles[name], labels, where)
        return roles[name]

    def created(self, call: Call, name: str, size: int, part: str = "") -> Labels:
        """Labels of the channels a layer creates; the same in every call of a shared layer.

        Args:
            call: The call.
            name: The role of the channels.
            size: How many.
            part: What tells them from other channels that the same layer creates, for reports.

        Returns:
            The labels.
        """
        roles = self._roles.setdefault(call.operation, {})
        labels = roles.get(name)
        if labels is None:
            labels = roles[name] = self.fresh(size, call.path, call.operation, part)
        return labels

    def following(self, layer: Any, name: str, size: int) -> Labels:
        """Labels of channels that a layer does not decide on: they go if what they meet goes.

        Args:
            layer: The layer.
            name: The role of the channels.
            size: How many.

        Returns:
            The labels; the same in every call of a shared layer.
        """
        roles = self._roles.setdefault(layer, {})
        labels = roles.get(name)
        if labels is None:
            labels = roles[name] = self._allocate(np.arange(self.size, self.size + size), NO_SLOT)
        return labels

    def produce(self, weight: Call, labels: Labels | None) -> None:
        """Makes an axis of an opened layer's own weight a creator of channels."""
        known = (p.labels is labels for p in self.producers)
        if labels is None or any(known):
            return
        self.producers.append(Producer(weight.path, weight.operation, labels))
        reason = self._why_left_out(weight.path, weight.operation)
        if reason is not None:
            self.freeze(labels, reason, weight.path)

    def share_roles(self, layer: Any, inner: Any) -> None:
        """Makes the named labels of a layer those of the layer inside it."""
        self._roles[layer] = self._roles.setdefault(inner, {})

    def roles(self, layer: Any) -> dict[str, Labels | None]:
        """All named labels of a layer."""
        return self._roles.get(layer, {})


def _of_assumed_size(graph: Graph) -> Graph:
    """The graph for inputs of the first assumed sizes that it can be called on.

    Some networks take sequences of one length alone: that of a table of positions, a weight.
    """
    tables = {weight.shape[0] for weight in graph.model.weights if len(weight.shape) == 2}
    error: Exception | None = None
    for length in (*ASSUMED_LENGTHS, *sorted(tables)):
        try:
            return graph.retrace(partial(_assume_size, length))
        except Exception as found:  # noqa: BLE001 (whatever its layers raise)
            error = found
    raise UnsupportedModelError(
        f"Model {graph.model.name!r} has inputs of unknown size and cannot be called on images of "
        f"{ASSUMED_IMAGE_SIZE} x {ASSUMED_IMAGE_SIZE} pixels or sequences of {ASSUMED_LENGTHS} "
        f"entries, for which its cost would be stated: {error} Give its inputs fixed shapes."
    ) from error


def _assume_size(length: int, value: Value) -> Value:
    size = ASSUMED_IMAGE_SIZE if len(value.shape) > 3 else length
    shape = (value.shape[0], *(size if n is None else n for n in value.shape[1:]))
    return Value(shape, value.dtype)
