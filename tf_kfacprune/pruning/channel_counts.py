"""Channel counts that the compact network may end with: multiples and minima.

Hardware reads channels in bundles of 4, 8 or 16, so 33 channels can be slower than 40 and never
faster than 32. `round_to` therefore keeps, of every group of neurons, as many as make the channel
count of each layer that creates them a multiple. Where groups are concatenated or a layer's
channels are split into several groups, each part is rounded, and so is the whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.graph import NeuronGroup
from tf_kfacprune.pruning.landing import OpenCounts
from tf_kfacprune.validation import require_count

__all__ = ["GateGroups"]

# Attention heads are no channels of their own: heads times dimensions are, and dimensions round.
_NOT_ROUNDED = ":heads"
_TWO = ", or two where one would take longer"


class GateGroups:
    """The gates of a network, group by group, and how many of each group may stay open.

    Attributes:
        of_gate: The group of each gate, integers of shape `(num_gates,)`.
        counts: What each group allows.
        anchors: For each group of flattened features and group of their channels: the gates of
            the channels, those of the features, and the place of each feature's channel among
            the channels. Of the best channel the best feature is never closed.
        least: For each group of *neurons* the smallest number that can be left.
        floor: The same in words.

    Args:
        gated: The gated network.
        round_to: Keep channels in multiples of this number. A group with fewer channels than
            that stays whole, with a warning: its hardware cost would not fall.
        min_channels: Keep at least so many channels per group (all, if it has fewer). None means
            one, unless the group lies in a residual branch that may be removed as a whole.
        measures: What the budget bounds. A group keeps two channels where one would cost more:
            convolutions from one channel to one may take longer than from one to sixteen.

    Raises:
        InvalidArgumentError: If an argument is no positive integer, or something is asked of a
            model built by hand whose gates do not correspond to neurons one to one, or of one
            whose flattened features are neurons: a channel without features is gone.
    """

    def __init__(
        self,
        gated: GatedNetwork,
        round_to: int | None = None,
        min_channels: int | None = None,
        measures: Iterable[str] = (),
    ) -> None:
        for name, value in (("round_to", round_to), ("min_channels", min_channels)):
            require_count("PrunableModel", name, value, optional=True)
        neuron_groups = gated.channels.groups
        self.counts: list[OpenCounts] = []
        self.anchors: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.least = [1] * len(neuron_groups)
        self.floor = "one neuron left per group, and none where a residual branch can go"
        if round_to is not None or min_channels is not None:
            self.floor = (
                f"what round_to={round_to} and min_channels={min_channels} leave of each group"
            )
        of_gate = _groups_of_gates(gated)
        if of_gate is None:
            if (round_to or 1) > 1 or (min_channels or 1) > 1:
                raise InvalidArgumentError(
                    f"Model {gated.net.name!r} has neurons with several gates, or gates of several "
                    "neurons, so `round_to` and `min_channels` cannot be kept. Received: "
                    f"round_to={round_to!r}, min_channels={min_channels!r}. Pass the model without "
                    "gates to PrunableModel, which places one per neuron, or leave them out."
                )
            sizes = [size for source in gated.sources for size in source.group_sizes]
            self.of_gate = np.repeat(np.arange(len(sizes)), sizes)
            self.counts += [OpenCounts(size) for size in sizes]
            return
        self.of_gate = of_gate
        if gated.channels.features and ((round_to or 1) > 1 or (min_channels or 1) > 1):
            raise InvalidArgumentError(
                "With prune_features=True a channel goes when its last feature does, so "
                "`round_to` and `min_channels` cannot be kept. Received: "
                f"round_to={round_to!r}, min_channels={min_channels!r}. Leave out one or the other."
            )
        whole = []
        for number, group in enumerate(neuron_groups):
            may_go = min_channels is None and number in gated.cost.branches.removable
            counts = _allowed(group, _multiplicities(gated, group), round_to, min_channels)
            if counts is None and round_to is not None:
                whole.append(group.name)
            if may_go:  # with nothing left, or what a group that stays may have
                counts = OpenCounts(group.size, 0, counts.step if counts else group.size)
            self.counts.append(counts or OpenCounts(group.size, least=group.size))
        self._anchor_features(gated)
        self.least = [counts.least for counts in self.counts]
        self._keep_two_where_cheaper(gated, measures)
        # Gates on channels that cannot be removed come last: closing them would save nothing.
        idle = np.bincount(of_gate, minlength=len(self.counts))[len(self.counts) :]
        self.counts += [OpenCounts(int(size), least=int(size)) for size in idle]
        if whole:
            warnings.warn(
                f"round_to={round_to}, min_channels={min_channels}: these groups have too few "
                f"channels to be pruned in such steps and stay whole: {', '.join(whole)}.",
                stacklevel=3,
            )

    def _anchor_features(self, gated: GatedNetwork) -> None:
        groups, channel_of = gated.channels.groups, gated.channels.features.channel
        links = gated.channels.features.links(groups)
        for number, below in links:
            channels, features = groups[below], np.array(groups[number].neurons)
            features = features[np.isin(channel_of[features], channels.neurons)]
            gates = gated.neuron_gates[:, 0]
            place = channel_of[features] - channels.start
            self.anchors.append((gates[channels.neurons], gates[features], place))
            others = sum(group == number for group, _ in links)
            self.counts[number] = replace(self.counts[number], least=others)

    def _keep_two_where_cheaper(self, gated: GatedNetwork, measures: Iterable[str]) -> None:
        # Of all measures only this one may fall where a gate opens.
        if "latency" not in measures:
            return
        for number, counts in enumerate(self.counts):
            two = [*self.least[:number], 2, *self.least[number + 1 :]]
            if (counts.least, counts.step) != (1, 1) or counts.size < 2:
                continue
            if gated.cost.least("latency", two) < gated.cost.least("latency", self.least):
                self.counts[number], self.least = replace(counts, least=2), two
                self.floor = self.floor.removesuffix(_TWO) + _TWO


def _groups_of_gates(gated: GatedNetwork) -> np.ndarray | None:
    """The group of neurons that each gate belongs to, or None if they do not match one to one."""
    gates = gated.neuron_gates
    if gates.shape[1] > 1 or len(np.unique(gates)) < len(gates):
        return None
    of_gate = np.full(gated.num_gates, len(gated.channels.groups))
    for number, group in enumerate(gated.channels.groups):
        of_gate[gates[group.start : group.start + group.size, 0]] = number
    return of_gate


def _multiplicities(gated: GatedNetwork, group: NeuronGroup) -> list[int]:
    """How many channels one neuron of a group has in each layer that creates it."""
    found = []
    for producer in gated.channels.flow.producers:
        if producer.name.endswith(_NOT_ROUNDED):
            continue
        neurons = gated.channels.neurons(producer.labels)
        channels = int(((neurons >= group.start) & (neurons < group.start + group.size)).sum())
        if channels:
            found.append(max(channels // group.size, 1))
    return found


def _allowed(
    group: NeuronGroup, channels_each: list[int], round_to: int | None, min_channels: int | None
) -> OpenCounts | None:
    """What is allowed, or None if the group is too small for it."""
    if not channels_each:
        return OpenCounts(group.size)
    step = math.lcm(*((round_to or 1) // math.gcd(round_to or 1, m) for m in channels_each))
    least = max(-(-(min_channels or 1) // m) for m in channels_each)
    least = -(-max(least, 1) // step) * step
    return OpenCounts(group.size, least, step) if least <= group.size else None
