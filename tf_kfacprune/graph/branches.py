"""Residual branches that may be removed as a whole.

Once every neuron that a contraction reads is closed, the contraction puts out its bias, the same
at every position (it reads zeros, borders included), and what treats its output element by element
puts out a constant, too. If that ends in `Add`, the branch contributes a constant per channel:
`x + f(x)` is `x + c`, exactly, and all that was computed for the branch alone can be cut out.

A group of neurons may therefore close completely if every layer that reads it either reads nothing
else and leads to `Add` in this way (a *cut*), or is needed by nothing but the branch. Everything
else keeps at least one neuron: behind a constant that enters another convolution, borders differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, tree

from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.rules.activations import (
    ActivationRule,
    ElementwiseRule,
    PReLURule,
    activation_reason,
)
from tf_kfacprune.graph.rules.channelwise import BatchNormalizationRule, LayerScaleRule, NoiseRule
from tf_kfacprune.graph.rules.registry import rule_for

__all__ = ["Branches"]

# Contractions that put out their bias when they read zeros.
_AFFINE = (
    *(layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D),
    *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
    *(layers.SeparableConv1D, layers.SeparableConv2D),
)
_ELEMENTWISE = (BatchNormalizationRule, LayerScaleRule, NoiseRule, ActivationRule, ElementwiseRule)
_OUTPUT = "output"  # stands for what uses a model output

Killers = frozenset[int]


class Branches:
    """Which groups of neurons may close completely, and what goes with each of them.

    Attributes:
        removable: Numbers of the groups that may close completely.
        cuts: Contractions whose output is constant once a group is gone, with that group.
        constants: Values that are constant then, with the group.

    Args:
        channels: The channel graph.
    """

    def __init__(self, channels: ChannelGraph) -> None:
        self._channels = channels
        self._calls = channels.graph.calls
        self._users = _users(channels)
        self._group_of_neuron = np.repeat(
            np.arange(len(channels.groups)), [group.size for group in channels.groups]
        )
        self.cuts = self._candidates()
        self.constants: dict[Value, int] = {}
        self._killers: dict[Call, Killers] = {}
        self._layer_killers: dict[Any, Killers] = {}
        while refused := self._refused():
            self.cuts = {call: g for call, g in self.cuts.items() if g not in refused}
        self.removable = frozenset(self.cuts.values())

    def killers(self, call: Call) -> Killers:
        """The groups any of which, once gone, makes a call unnecessary."""
        return self._killers[call]

    def killers_of_layer(self, layer: Any) -> Killers:
        """The groups any of which, once gone, makes all calls of a layer unnecessary."""
        return self._layer_killers.get(layer, frozenset())

    def gone(self, keep: np.ndarray) -> Killers:
        """The groups that are closed completely, given which neurons stay."""
        groups = self._channels.groups
        return frozenset(
            g for g in self.removable if not keep[groups[g].start : groups[g].neurons.stop].any()
        )

    def without_branches(self, keep: np.ndarray) -> np.ndarray:
        """`keep` without the neurons that exist only in branches that are gone."""
        keep, gone = keep.copy(), self.gone(keep)
        by_name = {p.name: p.layer for p in self._channels.flow.producers}
        for group in self._channels.groups if gone else ():
            layers_of_group = [by_name[name] for name in group.producers]
            if all(self.killers_of_layer(layer) & gone for layer in layers_of_group):
                keep[group.start : group.neurons.stop] = False
        return keep

    def left_constants(self) -> dict[Call, frozenset[int]]:
        """For each `Add` that a branch can leave a constant to, the groups that decide on it."""
        found = {}
        for call in filter(_is_add, self._calls):
            groups = frozenset(self.constants[v] for v in call.inputs if v in self.constants)
            if groups:
                found[call] = groups
        return found

    # ---- construction

    def _candidates(self) -> dict[Call, int]:
        """Contractions that read one group of channels alone and lead to `Add` only."""
        found = {}
        for edge in self._channels.edges:
            is_free = (edge.neurons < self._channels.num_neurons).all()
            is_whole = is_free and edge.flattened is None
            if edge.value is None or not is_whole or type(edge.layer) not in _AFFINE:
                continue
            if activation_reason(edge.layer.activation) is not None:
                continue
            groups = np.unique(self._group_of_neuron[edge.neurons])
            if len(groups) == 1 and self._leads_to_add(edge.call):
                found[edge.call] = int(groups[0])
        return found

    def _chain(self, call: Call) -> Iterator[Value]:
        """The output of a call and what is made of it element by element."""
        pending = [call.outputs[0]]
        while pending:
            value = pending.pop()
            yield value
            for user in self._users.get(value, ()):
                if _is_elementwise(user):
                    pending.append(user.outputs[0])

    def _leads_to_add(self, call: Call) -> bool:
        users = [user for value in self._chain(call) for user in self._users.get(value, ())]
        return all(user != _OUTPUT and (_is_elementwise(user) or _is_add(user)) for user in users)

    def _refused(self) -> set[int]:
        """Groups that cannot go after all, given the present cuts; updates what follows."""
        self.constants = {v: g for call, g in self.cuts.items() for v in self._chain(call)}
        conflicts = self._trace_killers()
        # In this order: a group that cannot go for its own sake must not be held against others.
        return self._still_needed() or conflicts or self._without_anchor()

    def _without_anchor(self) -> set[int]:
        """Groups that reach an `Add` without an operand that is never constant."""
        refused: set[int] = set()
        for call in filter(_is_add, self._calls):
            constant = [value for value in call.inputs if value in self.constants]
            others = [value for value in call.inputs if value not in self.constants]
            if constant and not any(value.shape == call.outputs[0].shape for value in others):
                refused.update(self.constants[value] for value in constant)
        return refused

    def _trace_killers(self) -> set[int]:
        """Finds out backwards what makes each call unnecessary.

        A call is unnecessary if all its uses are. That is decided by single groups only if the
        groups that end one use end every other use, too; groups for which this fails are returned.
        """
        conflicts: set[int] = set()
        self._killers = {}
        for call in reversed(self._calls):
            uses = [
                self._use(user, value)
                for value in call.outputs
                for user in self._users.get(value, ())
            ]
            killers = frozenset.intersection(*uses) if uses else frozenset()
            self._killers[call] = killers
            if killers not in uses and call.outputs[0] not in self._channels.flow.slot_origin:
                conflicts |= frozenset().union(*uses) - killers
        by_layer: dict[Any, list[Killers]] = {}
        for call in self._calls:
            by_layer.setdefault(call.operation, []).append(self._killers[call])
        for layer, each in by_layer.items():
            killers = self._layer_killers[layer] = frozenset.intersection(*each)
            if killers not in each and isinstance(layer, keras.Layer):
                conflicts |= frozenset().union(*each) - killers
        return conflicts

    def _use(self, user: Any, value: Value) -> Killers:
        """The groups that end one use of a value."""
        if user == _OUTPUT:
            return frozenset()
        ended = [g for g in (self.cuts.get(user), self.constants.get(value)) if g is not None]
        return self._killers[user].union(ended)

    def _still_needed(self) -> set[int]:
        """Groups with a reader or a producer that stays when the group goes."""
        refused: set[int] = set()
        removable = set(self.cuts.values())
        for edge in self._channels.edges:
            free = edge.neurons[edge.neurons < self._channels.num_neurons]
            ended = self._killers[edge.call] | {self.cuts.get(edge.call)}
            refused |= set(self._group_of_neuron[free].tolist()) & removable - ended
        by_name = {p.name: p.layer for p in self._channels.flow.producers}
        for g in removable:
            for name in self._channels.groups[g].producers:
                if g not in self.killers_of_layer(by_name[name]):
                    refused.add(g)
        return refused


def _users(channels: ChannelGraph) -> dict[Value, list[Any]]:
    """The calls that use each value, and `_OUTPUT` for the outputs of the model."""
    users: dict[Value, list[Any]] = {}
    for call in channels.graph.calls:
        for leaf in dict.fromkeys(_values((call.args, call.kwargs))):
            users.setdefault(leaf, []).append(call)
    for value in channels.graph.outputs:
        users.setdefault(value, []).append(_OUTPUT)
    return users


def _values(structure: Any) -> Iterable[Value]:
    return (leaf for leaf in tree.flatten(structure) if isinstance(leaf, Value))


def _is_elementwise(user: Any) -> bool:
    if user == _OUTPUT or len(user.inputs) != 1:
        return False
    rule = rule_for(user.operation)
    if isinstance(rule, ActivationRule) and activation_reason(user.operation.activation):
        return False
    return isinstance(rule, _ELEMENTWISE) and not isinstance(rule, PReLURule)


def _is_add(user: Any) -> bool:
    if user == _OUTPUT:
        return False
    is_operator = type(user.operation).__name__ == "Add" and not user.is_layer
    operands_only = len(tree.flatten((user.args, user.kwargs))) == len(user.inputs)
    return operands_only and (type(user.operation) is layers.Add or is_operator)
