"""Flattened features: neurons that are entries of other neurons, the channels that they lie in.

=======  ==================================================================  ======
symbol   meaning                                                             shape
=======  ==================================================================  ======
`o`      openness of each neuron by its own gate, in [0, 1]                  (n,)
`c(f)`   the channel that feature f is an entry of
`e`      openness of each neuron by all gates that it hangs on               (n,)
=======  ==================================================================  ======

A feature is there if its gate and that of its channel are open. A channel of which nothing but
features are read is there if its gate and that of one of its features are open:

    e_f = o_f o_c(f),      e_c = o_c (1 - prod_{f in c} (1 - o_f)).

For independent gates and their probabilities these are the expected values. All other neurons have
e = o.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

__all__ = ["Features"]


class Features:
    """Which neurons are flattened features, and of which channels.

    Attributes:
        channel: For each neuron the channel that it is an entry of; the number of neurons where it
            is no feature, or the channel cannot go.

    Args:
        count: Number of neurons; it stands for what cannot be removed.
        pairs: For each flattened tensor features and their channels, `(2, entries)`.
        read: Neurons that are read otherwise than through their features.
    """

    def __init__(self, count: int, pairs: Sequence[np.ndarray], read: Sequence[np.ndarray]) -> None:
        self.channel = np.full(count + 1, count)
        for features, channels in pairs:
            self.channel[features] = channels
        self.channel = self.channel[:count]
        kept = [channels[features == count] for features, channels in pairs]
        read_otherwise = np.concatenate([[count], *read, *kept])
        only_through = np.setdiff1d(self.channel, read_otherwise).astype(int)
        self._members = self._padded(only_through)
        # Where the product over the features of each neuron stands; past the end for 1.
        self._place = np.full(count, len(only_through))
        self._place[only_through] = np.arange(len(only_through))

    def __bool__(self) -> bool:
        return bool((self.channel < len(self.channel)).any())

    def tensor(self, openness: Any) -> Any:
        """Openness by all gates, e, differentiable, in the element type of `openness`."""
        if not self:
            return openness
        one, zero = ops.ones(1, openness.dtype), ops.zeros(1, openness.dtype)
        closed = 1.0 - ops.take(ops.concatenate([openness, zero]), self._members)
        some = ops.concatenate([1.0 - ops.prod(closed, axis=1), one])
        above = ops.take(ops.concatenate([openness, one]), self.channel)
        return openness * above * ops.take(some, self._place)

    def exact(self, openness: np.ndarray) -> np.ndarray:
        """As `tensor`, in NumPy, float64."""
        if not self:
            return openness
        closed = 1.0 - np.append(openness, 0.0)[self._members]
        some = np.append(1.0 - closed.prod(axis=1), 1.0)
        return openness * np.append(openness, 1.0)[self.channel] * some[self._place]

    def links(self, groups: Sequence[Any]) -> list[tuple[int, int]]:
        """Which groups of features hang on which groups of channels.

        Args:
            groups: All groups of neurons, in the order of their numbers.

        Returns:
            Pairs of the numbers of a group of features and a group of channels.
        """
        of_neuron = np.append(np.repeat(np.arange(len(groups)), [g.size for g in groups]), -1)
        pairs = np.stack([of_neuron[:-1], of_neuron[self.channel]], axis=1)
        return [(f, c) for f, c in np.unique(pairs[pairs[:, 1] >= 0], axis=0).tolist()]

    def completed(self, keep: np.ndarray, groups: Sequence[Any], scores: np.ndarray) -> np.ndarray:
        """Opens features until every group of channels has one that is read.

        Args:
            keep: Which neurons are open by their own gates, booleans; some of each group.
            groups: All groups of neurons.
            scores: How much each neuron deserves to stay.

        Returns:
            Which neurons stay, `e` of what is open then.
        """
        keep = keep.copy()
        for features, channels in self.links(groups):
            members, above = (np.array(groups[number].neurons) for number in (features, channels))
            hangs_on = members[np.isin(self.channel[members], above[keep[above]])]
            if len(hangs_on) and not keep[hangs_on].any():
                keep[hangs_on[np.argmax(scores[hangs_on])]] = True
        return self.exact(keep.astype(float)) > 0

    def _padded(self, channels: np.ndarray) -> np.ndarray:
        """The features of each channel, padded with the neuron that is never open."""
        count = len(self.channel)
        features = [np.flatnonzero(self.channel == c) for c in channels]
        members = np.full((len(channels), max([1, *map(len, features)])), count)
        for row, of_channel in zip(members, features, strict=True):
            row[: len(of_channel)] = of_channel
        return members
