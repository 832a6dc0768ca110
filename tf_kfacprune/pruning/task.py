"""What is to be pruned and how far: the common ground of the controller and the policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.pruning.budget import Budget
from tf_kfacprune.pruning.channel_counts import GateGroups
from tf_kfacprune.pruning.landing import land_on_budget
from tf_kfacprune.pruning.phases import Phases

__all__ = ["PruningTask"]


class PruningTask:
    """Network, budget and phases; plain, so that Keras does not track the network twice.

    Args:
        gated: The gated network.
        budget: The budget.
        phases: How the steps are divided.
        groups: How many gates of each group may stay open.
    """

    def __init__(
        self, gated: GatedNetwork, budget: Budget, phases: Phases, groups: GateGroups
    ) -> None:
        self.gated = gated
        self.budget = budget
        self.phases = phases
        self.groups = groups

    @property
    def gate_parameters(self) -> list[keras.Variable]:
        """The trainable parameters of all gates, one variable per source."""
        return [source.parameters for source in self.gated.sources]

    def parameters(self) -> Any:
        """`gate_parameters` as one tensor of shape `(num_gates,)`."""
        return ops.concatenate([tf.convert_to_tensor(values) for values in self.gate_parameters])

    def split(self, per_gate: Any) -> list[Any]:
        """A tensor of shape `(num_gates,)` as one tensor per source."""
        return tf.split(per_gate, [source.size for source in self.gated.sources])

    def to_gates(self, per_neuron: Any) -> Any:
        """What belongs to each gate of something per neuron, shape `(num_gates,)`.

        A neuron with several gates (there are some only in models built by hand) shares it out.
        """
        gates = self.gated.neuron_gates
        shares = ops.repeat(per_neuron / gates.shape[1], gates.shape[1])
        return ops.segment_sum(shares, gates.ravel(), self.gated.num_gates)

    def actual_openness(self) -> Any:
        """1 for each neuron of the deterministic network that is open now, else 0."""
        values = ops.concatenate([s.deterministic_values() for s in self.gated.sources])
        return self.gated.openness(ops.cast(values > 0, "float32"))

    def expected_openness(self) -> Any:
        """Probability that each neuron is open, differentiable."""
        return self.gated.openness(
            ops.concatenate([source.open_probability() for source in self.gated.sources])
        )

    def fraction(self, measure: str) -> Any:
        """Cost of the deterministic network relative to the dense one, a scalar tensor."""
        return self.gated.cost.fraction(measure, self.actual_openness())

    def keep_within(self, targets: Mapping[str, Any], scores: Any, *, fill: bool = True) -> Any:
        """Which gates stay open on a budget: 1 or 0, shape `(num_gates,)`.

        Args:
            targets: Largest fraction by measure.
            scores: How much each gate deserves to stay open, shape `(num_gates,)`.
            fill: Whether to use up what is left behind the first gate that does not fit.
        """
        gated = self.gated

        def fraction(measure: str, gates: Any) -> Any:
            # In float64, where counts are exact: a budget that is just met is met.
            return gated.cost.fraction(measure, gated.openness(ops.cast(gates, "float64")))

        return land_on_budget(
            self._with_anchors(scores),
            self.groups.of_gate,
            self.groups.counts,
            fraction,
            targets,
            fill=fill,
        )

    def _with_anchors(self, scores: Any) -> Any:
        """Scores in which the best feature of the best channel of a group is above all others."""
        for channels, features, place in self.groups.anchors:
            is_of_best = tf.equal(place, tf.argmax(tf.gather(scores, channels)))
            of_features = tf.gather(scores, features)
            lowest = tf.reduce_min(of_features) - 1
            best = tf.argmax(tf.where(is_of_best, of_features, lowest))
            is_anchor = tf.equal(
                np.arange(self.gated.num_gates, dtype="int32"), tf.gather(features, best)
            )
            scores = tf.where(is_anchor, tf.reduce_max(scores) + 1, scores)
        return scores
