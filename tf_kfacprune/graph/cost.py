"""Cost of a model as a function of how open its neurons are.

Every cost is a sum of products of *sizes*, one size per tracked weight or position axis:

    C(o) = sum_t c_t * s_{i_t}(o) * s_{j_t}(o) * s_{k_t}(o),      s(o) = n_fixed + sum_k m_k o_k

with openness o_k in [0, 1] of neuron k and m_k the number of positions it takes on the axis. What
exists only in a residual branch that may go as a whole is multiplied by one factor more, the
presence of the branch's deciding group g,

    1 - prod_{k in g} (1 - o_k).

For o in {0, 1} this equals counting the compact model; for probabilities it is the cost at the
expected sizes on all sides of every layer, and differentiable. Where entries of flattened channels
are neurons, o is what `features` makes of the openness of every gate.

MACs and parameters are *counted*. The bytes of files and the latency are *estimated*: they are such
sums, too, with coefficients of a file format or measured on a machine. The tensor arena is one such
sum and the largest of several others, one for each operation that may be the peak; its gradient is
that of the peak.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph.arena import ArenaBytes, Part
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.file_bytes import FileBytes
from tf_kfacprune.graph.int8_bytes import Int8Bytes
from tf_kfacprune.graph.int8_steps import Int8Steps
from tf_kfacprune.graph.latency import LatencyTable, latency_products, picking
from tf_kfacprune.graph.rules import Extent, rule_for, weight_extents, weight_of
from tf_kfacprune.graph.sizes import Sizes, Term

__all__ = ["CostModel"]


class CostModel:
    """Multiply-accumulates (MACs), parameters, file bytes, memory and latency of a model.

    MACs are those of Dense and convolution kernels per example, without biases. Parameters are
    all weights, biases and normalization statistics included, as in `model.count_params()`.
    Bytes are those of the float32 `.tflite` file, `flash` those of the full int8 file, `ram` those
    of the tensor arena for it, both at batch 1. Latency is in microseconds per example.
    Models for images or texts of any size are costed at 224 pixels a side or 128 tokens.

    Attributes:
        channels: The channel graph.
        branches: Residual branches of it that may be removed as a whole.
        macs_dense: MACs with all neurons open.
        params_dense: Parameters with all neurons open.
        measures: Names of the measures that are counted.
        available: Names of all measures; `"latency"` is among them if there is a table.

    Args:
        channels: A channel graph.
        ignore: Layers whose weights are not counted (gates).
        latency_table: Measured times of the layers, or None.
    """

    measures = ("macs", "params")

    def __init__(
        self,
        channels: ChannelGraph,
        ignore: Iterable[Any] = (),
        latency_table: LatencyTable | None = None,
    ) -> None:
        self.channels = channels
        self._sizes = Sizes(channels)
        self.branches = self._sizes.branches
        self._ignored = {id(layer) for layer in ignore}
        self.available = (
            *self.measures,
            "bytes",
            "flash",
            "ram",
            *(() if latency_table is None else ["latency"]),
        )
        # For each measure the terms of each layer, by the layer's id.
        self._terms: dict[str, dict[int, list[Term]]] = {name: {} for name in self.available}
        # What "ram" is the largest of, and when each of them holds.
        self._alternatives: list[list[Term]] = []
        self._moments: list[str] = []
        self._layers: dict[int, tuple[str, Any]] = {}
        self._collect()
        content = FileBytes(channels)
        self._collect_constants("bytes", content)
        self._collect_bytes(content)
        self._collect_board()
        if latency_table is not None:
            self._collect_latency(latency_table)
        self._sizes.complete()
        self._stacked = {
            name: self._sizes.stack(
                list(itertools.chain(*terms.values())),
                self._alternatives if name == "ram" else (),
            )
            for name, terms in self._terms.items()
        }
        everything = np.ones(channels.num_neurons)
        self._dense = {name: self.exact(name, everything) for name in self.available}
        self.macs_dense = round(self._dense["macs"])
        self.params_dense = round(self._dense["params"])

    # ---- evaluation

    def cost(self, measure: str, openness: Any) -> Any:
        """The cost, differentiable.

        Args:
            measure: One of `available`.
            openness: Tensor of shape `(num_neurons,)` in [0, 1].

        Returns:
            A scalar tensor.
        """
        return self.fraction(measure, openness) * self.dense(measure)

    def fraction(self, measure: str, openness: Any) -> Any:
        """The cost relative to the dense model, differentiable.

        Args:
            measure: One of `available`.
            openness: Tensor of shape `(num_neurons,)` in [0, 1], float32, or float64 for counts
                that are exact.

        Returns:
            A scalar tensor in [0, 1], of the same element type.
        """
        self._check(measure)
        openness = ops.convert_to_tensor(openness)
        value = self._stacked[measure].value(self._sizes.tensor(openness))
        return value / max(self._dense[measure], 1.0)

    def dense(self, measure: str) -> float:
        """The cost of the dense model; an integer for measures that are counted."""
        self._check(measure)
        return round(self._dense[measure]) if measure in self.measures else self._dense[measure]

    def count(self, measure: str, openness: Any) -> int:
        """The cost in exact arithmetic, e.g. of the compact model for openness in {0, 1}.

        Args:
            measure: One of `available`.
            openness: Array of shape `(num_neurons,)`.

        Returns:
            The cost, rounded to an integer.
        """
        return round(self.exact(measure, openness))

    def exact(self, measure: str, openness: Any) -> float:
        """The cost in float64; arguments as for `count`."""
        self._check(measure)
        return self._stacked[measure].exact(self._sizes.exact(np.asarray(openness, float)))

    def ram_peak(self, openness: Any) -> str:
        """What the runtime is at when it needs most memory.

        Args:
            openness: Array of shape `(num_neurons,)`.

        Returns:
            Path of the layer whose operation is the peak; `"planning"` or `"preparing <path>"` if
            preparing the file needs more than running it.
        """
        sizes = self._sizes.exact(np.asarray(openness, float))
        return self._moments[int(np.argmax(self._stacked["ram"].sums(sizes)[1]))]

    def least(self, measure: str, left: Sequence[int] | None = None) -> float:
        """The least fraction that can be reached.

        Args:
            measure: One of `available`.
            left: How many neurons are left of each group; by default one, or none where a residual
                branch can be removed as a whole.

        Returns:
            A number in [0, 1].
        """
        return self.exact(measure, self.leaving(left)) / max(self._dense[measure], 1.0)

    def leaving(self, left: Sequence[int] | None = None) -> np.ndarray:
        """Openness with the first neurons of each group alone, for `exact`.

        Args:
            left: How many are left of each group; by default as few as possible.

        Returns:
            Array of shape `(num_neurons,)`, 0 or 1.
        """
        groups = self.channels.groups
        keep = np.zeros(self.channels.num_neurons, bool)
        if left is None:
            left = [int(g not in self.branches.removable) for g in range(len(groups))]
        for group, count in zip(groups, left, strict=True):
            keep[group.start : group.start + count] = True
        return self.channels.features.completed(keep, groups, np.zeros(len(keep))).astype(float)

    def layer_costs(self, openness: Any) -> dict[str, dict[str, float]]:
        """Cost of each layer by measure, for tables.

        Args:
            openness: Array of shape `(num_neurons,)`.

        Returns:
            `{layer path: {"macs": ..., "params": ...}}` of all layers with a cost.
        """
        sizes = self._sizes.exact(np.asarray(openness, float))
        table: dict[str, dict[str, float]] = {}
        for key, (path, _) in self._layers.items():
            by_measure = {name: self._terms[name].get(key, []) for name in self.measures}
            if any(by_measure.values()):
                table[path] = {name: _evaluate(terms, sizes) for name, terms in by_measure.items()}
        return table

    # ---- construction

    def _collect(self) -> None:
        flow = self.channels.flow
        for call in self.channels.graph.calls:
            if call.is_layer:
                continue
            products = list(rule_for(call.operation).macs(call, flow))
            if products:
                while_called = self._sizes.presence(self.branches.killers(call))
                terms = [self._sizes.term(product, while_called) for product in products]
                self._terms["macs"].setdefault(id(call.operation), []).extend(terms)
                self._layers[id(call.operation)] = (call.path, call.operation)
        for call in self._counted_calls():
            layer, key = call.operation, id(call.operation)
            while_called = self._sizes.presence(self.branches.killers(call))
            while_used = self._sizes.presence(self.branches.killers_of_layer(layer))
            products = list(rule_for(layer).macs(call, flow))
            if products:
                terms = [self._sizes.term(product, while_called) for product in products]
                self._terms["macs"].setdefault(key, []).extend(terms)
            if key not in self._layers:
                self._layers[key] = (call.path, layer)
                weights = self._weight_products(layer)
                self._terms["params"][key] = [self._sizes.term(w, while_used) for w in weights]

    def _collect_bytes(self, content: FileBytes) -> None:
        terms = self._terms["bytes"]
        seen: set[int] = set()
        for call in self._counted_calls():
            key = id(call.operation)
            while_called = self._sizes.presence(self.branches.killers(call))
            records = self._sizes.term([content.of_call(call)], while_called)
            terms.setdefault(key, []).append(records)
            if key not in seen:
                seen.add(key)
                terms[key] += self._stored(call, content)

    def _stored(self, call: Call, content: FileBytes | Int8Bytes) -> list[Term]:
        """The values of a layer's weights in a file."""
        layer = call.operation
        while_used = self._sizes.presence(self.branches.killers_of_layer(layer))
        stored = content.of_weights(call, self._weight_products(layer))
        return [self._sizes.term(product, while_used) for product in stored]

    def _collect_constants(self, measure: str, content: FileBytes | Int8Bytes) -> None:
        """What belongs to no layer: the frame of a file, and what removed branches leave."""
        terms = self._terms[measure]
        terms[id(self)] = [self._sizes.term(product) for product in content.of_file()]
        for call, groups in self.branches.left_constants().items():
            while_called = self._sizes.presence(self.branches.killers(call))
            for product, branch in itertools.product(
                content.of_constant(call), self._sizes.presence(groups)
            ):
                terms[id(self)] += [
                    self._sizes.term(product, while_called),
                    self._sizes.term([-1.0, *product], [*while_called, branch]),
                ]

    def _collect_board(self) -> None:
        """Flash and RAM of the int8 file."""
        content = Int8Bytes(self.channels)
        operations = Int8Steps(self.channels, lambda call: id(call.operation) in self._ignored)
        self._collect_constants("flash", content)
        terms = self._terms["flash"]
        for step in operations.steps:
            while_called = self._sizes.presence(self.branches.killers(step.call))
            terms.setdefault(id(step.call.operation), []).extend(
                self._sizes.term(product, while_called) for product in content.of_step(step)
            )
        for call in {id(call.operation): call for call in self._counted_calls()}.values():
            terms.setdefault(id(call.operation), []).extend(self._stored(call, content))
        arena = ArenaBytes(operations)
        self._terms["ram"][id(self)] = [self._arena_term(part) for part in arena.records()]
        for moment, parts in arena.alternatives():
            self._moments.append(moment)
            self._alternatives.append([self._arena_term(part) for part in parts])

    def _arena_term(self, part: Part) -> Term:
        killers = () if part.call is None else self.branches.killers(part.call)
        return self._sizes.term(part.product, self._sizes.presence(killers))

    def _collect_latency(self, table: LatencyTable) -> None:
        for call in self._counted_calls():
            while_called = self._sizes.presence(self.branches.killers(call))
            products = latency_products(call, self.channels.flow, table)
            self._terms["latency"].setdefault(id(call.operation), []).extend(
                self._sizes.term(product, while_called) for product in products
            )
        self._terms["latency"][id(self)] = [
            (table.overhead, ()),
            *(self._sizes.term([picking(table), p.labels]) for p in self.channels.picked),
        ]

    def _counted_calls(self) -> list[Call]:
        return [
            call
            for call in self.channels.graph.calls
            if isinstance(call.operation, keras.Layer) and id(call.operation) not in self._ignored
        ]

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

    def _check(self, measure: str) -> None:
        if measure not in self.available:
            raise InvalidArgumentError(
                f"Argument `measure` must be one of {self.available}. Received: {measure!r}"
            )


def _evaluate(terms: Sequence[tuple[float, tuple[int, ...]]], sizes: np.ndarray) -> float:
    return float(sum(c * sizes[list(indices)].prod() for c, indices in terms))
