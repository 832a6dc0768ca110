"""What can be pruned in a model, what cannot and why, and what pruning would save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.export.serving import layers_within
from tf_kfacprune.gates import GatedNetwork, GateSource
from tf_kfacprune.graph import (
    ChannelGraph,
    CostModel,
    LatencyTable,
    analyze,
    lacking_on_micro,
    network_of,
    opaque_layers,
    reasons,
    unconfirmed_on_micro,
    unread_weights,
)
from tf_kfacprune.reporting.rendering import Rendered
from tf_kfacprune.validation import require

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

__all__ = ["FrozenChannels", "GroupSummary", "Inspection", "OpaqueLayer", "inspect"]

# Longer lists of layers are cut in the table (not in the data).
_LAYERS_SHOWN = 4
# Longer lists stand one name a line: a narrow terminal would break them before the commas.
_LONGEST_LINE = 30


@dataclass(frozen=True)
class GroupSummary:
    """One group of neurons that have the same producers.

    Attributes:
        name: name of the group.
        size: number of neurons.
        producers: layers or inputs that create the neurons; a neuron goes in all of them at once.
        consumers: layers that read them.
        macs_saved: fraction of the model's MACs saved if one neuron stays (or none, if the group
            is removable), in [0, 1].
        params_saved: the same for parameters.
        removable: whether the group may close completely, because it decides about a residual
            branch, which then goes as a whole.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    macs_saved: float
    params_saved: float
    removable: bool = False


@dataclass(frozen=True)
class FrozenChannels:
    """Channels that cannot be removed.

    Attributes:
        layer: layer or input that creates them.
        channels: how many.
        reason: why, one of the constants in `tf_kfacprune.graph.reasons`.
        where: layer or operation that froze them.
        remedy: what would unfreeze them, None if nothing would.
    """

    layer: str
    channels: int
    reason: str
    where: str
    remedy: str | None = None


@dataclass(frozen=True)
class OpaqueLayer:
    """A layer whose inside is not seen: its weights stay, and its MACs are not counted.

    Attributes:
        layer: the layer.
        kind: its class.
        params: number of its weights, which are counted.
        reason: why it was not opened.
    """

    layer: str
    kind: str
    params: int
    reason: str


@dataclass(frozen=True)
class Inspection(Rendered):
    """The result of `inspect`; printing it shows tables, a notebook shows them as HTML.

    Attributes:
        name: name of the model.
        macs: multiply-accumulates of one inference, without biases and without those of opaque
            layers.
        params: number of weights, biases and normalization statistics included, without those that
            are ``unread``.
        groups: groups of prunable neurons, in the order of the model.
        frozen: channels that cannot be removed, with reasons.
        least_macs: the least fraction of MACs that pruning can reach, one neuron left per group
            and none of those that are removable.
        least_params: the same for parameters.
        flash: bytes of the int8 file, as predicted.
        ram: bytes of the tensor arena in which TensorFlow Lite Micro runs it, as predicted.
        ram_peak: layer whose operation needs most of it; ``"planning"`` or ``"preparing <layer>"``
            if preparing the file needs more than running it.
        lacking: layers whose operations that runtime has no kernel for, each with the operation.
        unconfirmed: layers, each with its class, for which the predicted bytes were not held
            against that runtime.
        opened: custom layers that were replaced by what is inside them, with their classes.
        opaque: layers without a channel rule that could not be opened, with the reason.
        unread: weights that no call reads, with their numbers of entries. They are in no count, and
            the compact model is without them.
        latency: microseconds of one inference, as predicted; None without a table of latencies.
        latency_of: of which file: ``"float32"`` or ``"int8"``.
        processor: on which processor.
    """

    name: str
    macs: int
    params: int
    groups: tuple[GroupSummary, ...]
    frozen: tuple[FrozenChannels, ...]
    least_macs: float
    least_params: float
    flash: int
    ram: int
    ram_peak: str
    lacking: tuple[str, ...] = ()
    unconfirmed: tuple[tuple[str, str], ...] = ()
    opened: tuple[tuple[str, str], ...] = ()
    opaque: tuple[OpaqueLayer, ...] = ()
    unread: tuple[tuple[str, int], ...] = ()
    latency: float | None = None
    latency_of: str | None = None
    processor: str | None = None

    @property
    def num_neurons(self) -> int:
        """Number of prunable neurons."""
        return sum(group.size for group in self.groups)

    def render(self) -> Group:
        from rich.console import Group

        parts: list[RenderableType] = [
            f"Model {self.name!r}: {self.params:,} parameters, {self.macs:,} MACs. "
            f"{self.num_neurons:,} neurons can be pruned; at the least "
            f"{_percent(self.least_params)} of the parameters and {_percent(self.least_macs)} of "
            "the MACs stay.",
            f"On a microcontroller, in int8: {self.flash:,} bytes of flash and {self.ram:,} bytes "
            f"of RAM, most of them at {self.ram_peak}.",
        ]
        if self.lacking:
            parts.append(
                "TensorFlow Lite Micro has no kernel for what becomes of "
                f"{_shown(self.lacking)}: no microcontroller will run this model."
            )
        if self.unconfirmed:
            kinds = ", ".join(dict.fromkeys(kind for _, kind in self.unconfirmed))
            parts.append(f"Flash and RAM were not confirmed on its runtime for {kinds}.")
        if self.latency is not None:
            parts.append(
                f"One inference of the {self.latency_of} file takes {self.latency:.1f} "
                f"microseconds on {self.processor}."
            )
        if self.opened:
            names = tuple(f"{path} ({kind})" for path, kind in self.opened)
            parts.append(f"Custom layers that were opened: {_shown(names)}.")
        if self.unread:
            names = tuple(f"{path} ({count:,})" for path, count in self.unread)
            parts.append(
                "Weights that no call reads, which are in no count and go in compaction: "
                f"{_shown(names)}."
            )
        if self.groups:
            parts.append(self._group_table())
        if self.opaque:
            parts.append(self._opaque_table())
        if self.frozen:
            parts.append(self._frozen_table())
            parts += self._remedies()
        return Group(*parts)

    def _group_table(self) -> RenderableType:
        from rich.table import Table

        caption = "saved: when one neuron of the group stays"
        if any(group.removable for group in self.groups):
            caption += "; *: when none stays and its residual branch goes as a whole"
        table = Table(
            title="Neurons that can be pruned",
            caption=caption,
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("created by", overflow="fold")
        table.add_column("neurons", justify="right")
        table.add_column("read by", overflow="fold")
        table.add_column("MACs\nsaved", justify="right", no_wrap=True)
        table.add_column("params\nsaved", justify="right", no_wrap=True)
        for group in self.groups:
            mark = " *" if group.removable else ""
            table.add_row(
                _shown((group.name, *group.producers[1:])),
                f"{group.size:,}",
                _shown(group.consumers),
                _percent(group.macs_saved) + mark,
                _percent(group.params_saved) + mark,
            )
        return table

    def _opaque_table(self) -> RenderableType:
        from rich.table import Table

        table = Table(
            title="Layers whose inside is not seen",
            caption="their weights stay, what they read stays, their MACs are not counted",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("class", overflow="fold")
        table.add_column("params", justify="right")
        table.add_column("why it is not opened", overflow="fold")
        for opaque in self.opaque:
            table.add_row(opaque.layer, opaque.kind, f"{opaque.params:,}", opaque.reason)
        return table

    def _frozen_table(self) -> RenderableType:
        from rich.table import Table

        table = Table(title="Channels that cannot be pruned", title_justify="left")
        table.add_column("created by", overflow="fold")
        table.add_column("channels", justify="right")
        table.add_column("reason", overflow="fold")
        table.add_column("at", overflow="fold")
        for frozen in self.frozen:
            table.add_row(frozen.layer, f"{frozen.channels:,}", frozen.reason, frozen.where)
        return table

    def _remedies(self) -> list[RenderableType]:
        """One line per reason that something can be done about."""
        known = {f.reason: f.remedy for f in self.frozen if f.remedy is not None}
        lines = [f"  {reason}: {remedy}" for reason, remedy in known.items()]
        return ["What would unfreeze them:", *lines] if lines else []


def inspect(
    model: Any,
    *,
    prune_inputs: bool = False,
    prune_features: bool = False,
    include: Sequence[Any] | None = None,
    exclude: Sequence[Any] = (),
    latency_table: LatencyTable | None = None,
) -> Inspection:
    """Shows what can be pruned in a model, what cannot and why, and what it would save.

    Args:
        model: a Sequential or Functional model; also a gated model or a `PrunableModel`, whose
            own gates then decide (the other arguments must be left out).
        prune_inputs: whether input features may be pruned too.
        prune_features: whether flattened features may be pruned one by one.
        include: layers that may lose neurons: names, regular expressions or layers; by default
            all.
        exclude: layers that keep all their neurons, likewise; wins over ``include``.
        latency_table: measured times of the layers, from `kp.export.latency_table`, to show the
            latency, too; by default that of the `PrunableModel`.

    Returns:
        An inspection that prints as tables.

    Raises:
        UnsupportedModelError: if the model cannot be traced, or options are given for a model
            that already has gates.
        InvalidArgumentError: if ``model`` is no model, or ``include`` or ``exclude`` names a layer
            that does not exist.

    Examples:
        >>> import keras, tf_kfacprune as kp
        >>> net = keras.Sequential([
        ...     keras.Input((8,)), keras.layers.Dense(16, name="fc"), keras.layers.Dense(2)
        ... ])
        >>> kp.inspect(net).groups[0].size
        16
    """
    net = network_of(model)
    require("inspect", isinstance(net, keras.Model), "model", "a keras.Model", model)
    table = latency_table or getattr(model, "latency_table", None)
    channels, cost = _analysis(net, prune_inputs, prune_features, include, exclude, table)
    graph, everything = channels.graph, np.ones(channels.num_neurons)
    return Inspection(
        name=net.name,
        macs=cost.macs_dense,
        params=cost.params_dense,
        groups=tuple(_summaries(channels, cost)),
        frozen=tuple(
            FrozenChannels(f.layer, f.channels, f.reason, f.where, reasons.remedy(f.reason))
            for f in channels.frozen
        ),
        least_macs=cost.least("macs"),
        least_params=cost.least("params"),
        flash=cost.count("flash", everything),
        ram=cost.count("ram", everything),
        ram_peak=cost.ram_peak(everything),
        lacking=lacking_on_micro(channels),
        unconfirmed=unconfirmed_on_micro(channels),
        opened=tuple((path, type(layer).__name__) for path, layer in graph.opened.items()),
        opaque=tuple(
            OpaqueLayer(o.path, type(o.layer).__name__, o.params, o.reason)
            for o in opaque_layers(graph)
        ),
        unread=tuple((w.path, math.prod(w.shape)) for w in unread_weights(graph)),
        latency=None if table is None else cost.dense("latency"),
        latency_of=None if table is None else table.of,
        processor=None if table is None else table.processor,
    )


def _analysis(
    net: Any,
    prune_inputs: bool,
    prune_features: bool,
    include: Sequence[Any] | None,
    exclude: Sequence[Any],
    table: LatencyTable | None,
) -> tuple[ChannelGraph, CostModel]:
    has_gates = any(isinstance(layer, GateSource) for layer in layers_within(net))
    if not has_gates:
        channels = analyze(
            net,
            prune_inputs=prune_inputs,
            prune_features=prune_features,
            include=include,
            exclude=exclude,
        )
        return channels, CostModel(channels, latency_table=table)
    if prune_inputs or prune_features or exclude or include is not None:
        raise UnsupportedModelError(
            f"Model {net.name!r} already has gates, which decide what is pruned: leave out "
            "prune_inputs, prune_features, include and exclude, or inspect the model without gates."
        )
    gated = GatedNetwork(net, table)
    return gated.channels, gated.cost


def _summaries(channels: ChannelGraph, cost: CostModel) -> list[GroupSummary]:
    summaries = []
    for number, group in enumerate(channels.groups):
        removable = number in cost.branches.removable
        left = [other.size for other in channels.groups]
        left[number] = int(not removable)
        openness = cost.leaving(left)
        saved = {
            measure: 1.0 - cost.count(measure, openness) / max(cost.dense(measure), 1)
            for measure in cost.measures
        }
        summaries.append(
            GroupSummary(
                name=group.name,
                size=group.size,
                producers=group.producers,
                consumers=group.consumers,
                macs_saved=saved["macs"],
                params_saved=saved["params"],
                removable=removable,
            )
        )
    return summaries


def _shown(names: tuple[str, ...]) -> str:
    """Names in one short line, or one below the other."""
    left_out = len(names) - _LAYERS_SHOWN + 1 if len(names) > _LAYERS_SHOWN else 0
    shown = names[: len(names) - left_out]
    tail = f"and {left_out} more" if left_out else ""
    line = f"{', '.join(shown)} {tail}".strip()
    return line if len(line) <= _LONGEST_LINE else "\n".join([*shown, tail]).strip()


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.1f} %" if percent >= 0.1 or percent == 0 else f"{percent:.1g} %"
