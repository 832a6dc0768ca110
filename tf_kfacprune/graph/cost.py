"""Cost of a model as a function of how open its neurons are.

Every cost is a sum of products of *sizes*, one size per tracked weight or position axis:

    C(o) = sum_t c_t * s_{i_t}(o) * s_{j_t}(o) * s_{k_t}(o),      s(o) = n_fixed + sum_k m_k o_k

with openness o_k in [0, 1] of neuron k and m_k the number of positions it takes on the axis. What
exists only in a residual branch that may go as a whole is multiplied by one factor more, the
presence of the branch's deciding group g,

    1 - prod_{k in g} (1 - o_k).

For o in {0, 1} this equals counting the compact model; for probabilities it is the cost at the
expected sizes on all sides of every layer, and differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph.branches import Branches
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.rules import Extent, rule_for, weight_extents, weight_of

__all__ = ["CostModel"]

_ONE = 0  # the size that is always 1, for products of fewer than three sizes


class CostModel:
    """Multiply-accumulates (MACs) and parameters of a model.

    MACs are those of Dense and convolution kernels per example, without biases. Parameters are
    all weights, biases and normalization statistics included, as in `model.count_params()`.
    Models for images or texts of any size are costed at 224 pixels a side or 128 tokens.

    Attributes:
        channels: The channel graph.
        branches: Residual branches of it that may be removed as a whole.
        macs_dense: MACs with all neurons open.
        params_dense: Parameters with all neurons open.
        measures: Names of the measures.

    Args:
        channels: A channel graph.
        ignore: Layers whose weights are not counted (gates).
    """

    measures = ("macs", "params")

    def __init__(self, channels: ChannelGraph, ignore: Iterable[Any] = ()) -> None:
        self.channels = channels
        self.branches = Branches(channels)
        self._deciding = sorted(self.branches.removable)
        self._ignored = {id(layer) for layer in ignore}
        self._sizes: dict[bytes, int] = {b"": _ONE}
        self._fixed: list[float] = [1.0]
        self._members: list[np.ndarray] = [np.zeros(0, int)]
        self._counts: list[np.ndarray] = [np.zeros(0)]
        self._macs: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        self._params: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        self._layers: dict[int, tuple[str, Any]] = {}
        self._collect()
        total = len(self._fixed) + len(self._deciding)
        self._terms = {
            name: _stack(terms.values(), total) for name, terms in self._by_measure().items()
        }
        self._gather = np.concatenate(self._members).astype("int32")
        owners = np.repeat(np.arange(len(self._members)), [len(m) for m in self._members])
        self._owner = owners.astype("int32")
        self._weight = np.concatenate(self._counts).astype("float32")
        self._fixed_sizes = np.array(self._fixed, "float32")
        self._deciding_neurons = self._padded_members()
        everything = np.ones(channels.num_neurons)
        self.macs_dense = round(self._exact("macs", everything))
        self.params_dense = round(self._exact("params", everything))

    # ---- evaluation

    def cost(self, measure: str, openness: Any) -> Any:
        """The cost, differentiable, in float32.

        Args:
            measure: `"macs"` or `"params"`.
            openness: Tensor of shape `(num_neurons,)` in [0, 1].

        Returns:
            A scalar tensor.
        """
        return self.fraction(measure, openness) * self.dense(measure)

    def fraction(self, measure: str, openness: Any) -> Any:
        """The cost relative to the dense model, differentiable.

        Args:
            measure: `"macs"` or `"params"`.
            openness: Tensor of shape `(num_neurons,)` in [0, 1].

        Returns:
            A scalar tensor in [0, 1].
        """
        self._check(measure)
        coefficients, indices = self._terms[measure]
        coefficients = (coefficients / max(self.dense(measure), 1)).astype("float32")
        sizes = self._size_tensor(openness)
        factors = [ops.take(sizes, indices[:, k]) for k in range(indices.shape[1])]
        return ops.sum(coefficients * math.prod(factors[1:], start=factors[0]))

    def dense(self, measure: str) -> int:
        """The cost of the dense model."""
        self._check(measure)
        return self.macs_dense if measure == "macs" else self.params_dense

    def count(self, measure: str, openness: Any) -> int:
        """The cost in exact arithmetic, e.g. of the compact model for openness in {0, 1}.

        Args:
            measure: `"macs"` or `"params"`.
            openness: Array of shape `(num_neurons,)`.

        Returns:
            The cost, rounded to an integer.
        """
        self._check(measure)
        return round(self._exact(measure, np.asarray(openness, float)))

    def least(self, measure: str, left: Sequence[int] | None = None) -> float:
        """The least fraction that can be reached.

        Args:
            measure: `"macs"` or `"params"`.
            left: How many neurons are left of each group; by default one, or none where a residual
                branch can be removed as a whole.

        Returns:
            A number in [0, 1].
        """
        groups = self.channels.groups
        openness = np.zeros(self.channels.num_neurons)
        if left is None:
            left = [int(g not in self.branches.removable) for g in range(len(groups))]
        for group, count in zip(groups, left, strict=True):
            openness[group.start : group.start + count] = 1.0
        return self.count(measure, openness) / max(self.dense(measure), 1)

    def layer_costs(self, openness: Any) -> dict[str, dict[str, float]]:
        """Cost of each layer by measure, for tables.

        Args:
            openness: Array of shape `(num_neurons,)`.

        Returns:
            `{layer path: {"macs": ..., "params": ...}}` of all layers with a cost.
        """
        sizes = self._exact_sizes(np.asarray(openness, float))
        table: dict[str, dict[str, float]] = {}
        for key, (path, _) in self._layers.items():
            by_measure = {name: terms.get(key, []) for name, terms in self._by_measure().items()}
            if any(by_measure.values()):
                table[path] = {name: _evaluate(terms, sizes) for name, terms in by_measure.items()}
        return table

    def layer_sizes(self, openness: Any) -> dict[str, dict[str, float]]:
        """How many channels every layer reads and creates.

        Args:
            openness: Array of shape `(num_neurons,)`.

        Returns:
            `{layer path: {role: size}}`, e.g. `{"conv2": {"in": 20, "out": 50}}`.
        """
        extended = np.append(np.asarray(openness, float), 1.0)
        return {
            path: {role: float(extended[n].sum()) for role, n in self.channels.roles(layer).items()}
            for path, layer in self._layers.values()
            if self.channels.roles(layer)
        }

    # ---- construction

    def _collect(self) -> None:
        flow = self.channels.flow
        for call in self.channels.graph.calls:
            layer, rule = call.operation, rule_for(call.operation)
            if not isinstance(layer, keras.Layer) or id(layer) in self._ignored:
                continue
            key = id(layer)
            while_called = self._presence(self.branches.killers(call))
            while_used = self._presence(self.branches.killers_of_layer(layer))
            products = list(rule.macs(call, flow))
            if products:
                terms = [self._term(product, while_called) for product in products]
                self._macs.setdefault(key, []).extend(terms)
            if key not in self._layers:
                self._layers[key] = (call.path, layer)
                weights = self._weight_products(layer)
                self._params[key] = [self._term(weight, while_used) for weight in weights]

    def _weight_products(self, layer: keras.Layer) -> list[list[Extent]]:
        """One product of extents per weight of a layer."""
        by_weight = {
            id(weight_of(layer, name)): axes
            for name, axes in rule_for(layer).weight_roles(layer).items()
        }
        return [
            weight_extents(
                weight,
                by_weight.get(id(weight), [None] * len(weight.shape)),
                layer,
                self.channels.flow,
            )
            for weight in layer.weights
        ]

    def _presence(self, groups: Iterable[int]) -> list[int]:
        """Numbers of the presence factors of groups: they lie behind all sizes, in reverse."""
        return [-1 - self._deciding.index(group) for group in groups]

    def _padded_members(self) -> np.ndarray:
        """The neurons of each deciding group, padded with the neuron that is never open."""
        groups = [self.channels.groups[g] for g in self._deciding]
        shape = (len(groups), max([1, *(group.size for group in groups)]))
        members = np.full(shape, self.channels.num_neurons, "int32")
        for row, group in zip(members, groups, strict=True):
            row[: group.size] = group.neurons
        return members[::-1]

    def _term(
        self, product: Sequence[Extent], factors: Sequence[int]
    ) -> tuple[float, tuple[int, ...]]:
        coefficient, sizes = 1.0, [*factors]
        for extent in product:
            if isinstance(extent, np.ndarray):
                sizes.append(self._size(self.channels.neurons(extent)))
            else:
                coefficient *= extent
        return coefficient, tuple(size for size in sizes)

    def _size(self, neurons: np.ndarray) -> int:
        """The number of a size, equal for equal arrays of neurons."""
        members, counts = np.unique(neurons, return_counts=True)
        prunable = members < self.channels.num_neurons
        fixed = float(counts[~prunable].sum())
        members, counts = members[prunable], counts[prunable].astype(float)
        key = members.tobytes() + counts.tobytes() + np.float64(fixed).tobytes()
        if key not in self._sizes:
            self._sizes[key] = len(self._fixed)
            self._fixed.append(fixed)
            self._members.append(members)
            self._counts.append(counts)
        return self._sizes[key]

    def _by_measure(self) -> dict[str, dict[int, list[tuple[float, tuple[int, ...]]]]]:
        return {"macs": self._macs, "params": self._params}

    def _check(self, measure: str) -> None:
        if measure not in self.measures:
            raise InvalidArgumentError(
                f"Argument `measure` must be one of {self.measures}. Received: {measure!r}"
            )

    def _size_tensor(self, openness: Any) -> Any:
        open_counts = ops.take(openness, self._gather) * self._weight
        summed = ops.segment_sum(open_counts, self._owner, num_segments=len(self._fixed))
        sizes = summed + self._fixed_sizes
        if not self._deciding:
            return sizes
        members = ops.take(ops.append(openness, ops.zeros(1)), self._deciding_neurons)
        return ops.concatenate([sizes, 1.0 - ops.prod(1.0 - members, axis=1)])

    def _exact_sizes(self, openness: np.ndarray) -> np.ndarray:
        open_counts = openness[self._gather] * self._weight
        sizes = self._fixed + np.bincount(self._owner, open_counts, minlength=len(self._fixed))
        members = np.append(openness, 0.0)[self._deciding_neurons]
        return np.concatenate([sizes, 1.0 - np.prod(1.0 - members, axis=1)])

    def _exact(self, measure: str, openness: np.ndarray) -> float:
        coefficients, indices = self._terms[measure]
        return float(coefficients @ self._exact_sizes(openness)[indices].prod(axis=1))


def _stack(
    terms: Iterable[list[tuple[float, tuple[int, ...]]]], total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients `(terms,)` and size numbers `(terms, factors)` of a sum of products.

    Numbers below zero count from the end of all `total` sizes.
    """
    flat = [term for layer_terms in terms for term in layer_terms]
    width = max([1, *(len(sizes) for _, sizes in flat)])
    indices = np.full((len(flat), width), _ONE, "int32")
    for row, (_, sizes) in enumerate(flat):
        indices[row, : len(sizes)] = [size % total for size in sizes]
    return np.array([coefficient for coefficient, _ in flat], float), indices


def _evaluate(terms: Sequence[tuple[float, tuple[int, ...]]], sizes: np.ndarray) -> float:
    return float(sum(c * sizes[list(indices)].prod() for c, indices in terms))
