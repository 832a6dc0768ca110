"""A compact copy of a network whose gates have settled, to be trained in its place."""

from __future__ import annotations

import keras

from tf_kfacprune.compaction.plan import RemovalPlan
from tf_kfacprune.compaction.rebuilding import rebuild_compact
from tf_kfacprune.compaction.weights import fold_gates
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import GatedNetwork

__all__ = ["WorkingCopy"]


class WorkingCopy:
    """What stays of a settled network, with weights that can go back to where they came from.

    Gates that are neither open nor closed are first folded into the weights that read them, in the
    network itself, whose function stays the same. After that every weight of the copy is a part of
    one of the network, to the bit.

    Attributes:
        net: The copy, a Functional model without gates.

    Args:
        gated: The network, settled.

    Raises:
        UnsupportedModelError: If the network cannot be made smaller, or the copy would need
            weights that are no mere part of the network's.
    """

    def __init__(self, gated: GatedNetwork) -> None:
        plan = RemovalPlan(gated.net, gated)
        if not plan.is_wholly_folded:
            raise UnsupportedModelError(
                f"Gates of {gated.net.name!r} that are neither open nor closed scale products of "
                "tensors, which no weight absorbs: a smaller copy cannot be trained in its place."
            )
        for layer in plan.readers:
            fold_gates(layer, plan)
        for source in gated.sources:
            source.set_values(keras.ops.convert_to_numpy(source.deterministic_values()) > 0)
        self.net, self._links = rebuild_compact(RemovalPlan(gated.net, gated))
        different = [link.source.path for link in self._links if not link.is_copy]
        if different:
            raise UnsupportedModelError(
                f"Weights of {gated.net.name!r} change their meaning with the number of channels, "
                f"so that a smaller copy cannot be trained in its place: {', '.join(different)}."
            )

    def fetch(self) -> None:
        """Takes the weights of the network."""
        for link in self._links:
            link.fetch()

    def write_back(self) -> None:
        """Puts the weights back into the network."""
        for link in self._links:
            link.write_back()
