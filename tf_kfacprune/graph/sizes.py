"""Sizes: how many open channels lie on an axis, as functions of how open neurons are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from tf_kfacprune.graph.branches import Branches
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.curves import Curve, Curves
from tf_kfacprune.graph.rules import Extent

__all__ = ["Curved", "Factor", "Sizes", "Stack", "Term"]

# A coefficient and the numbers of the sizes it is multiplied by.
Term = tuple[float, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Curved:
    """A function of an extent.

    Attributes:
        extent: The extent.
        curve: The function.
    """

    extent: Extent
    curve: Curve


# What a product is made of: a coefficient, an extent, or a function of one.
Factor = Extent | float | Curved


@dataclass(frozen=True)
class Stack:
    """A sum of products of sizes, or such a sum and the largest of several others beside it.

    Attributes:
        coefficients: One number per product, `(products,)`.
        indices: Numbers of the sizes it is multiplied by, `(products, factors)`.
        owners: For each product 0 if it is in the sum that always counts, else the number of the
            alternative that it belongs to, counted from 1.
        alternatives: Number of alternatives, 0 for a mere sum.
    """

    coefficients: np.ndarray
    indices: np.ndarray
    owners: np.ndarray
    alternatives: int = 0

    def value(self, sizes: Any) -> Any:
        """The value, differentiable; the gradient is that of the largest alternative."""
        factors = [ops.take(sizes, self.indices[:, k]) for k in range(self.indices.shape[1])]
        products = math.prod(factors, start=ops.cast(self.coefficients, sizes.dtype))
        if not self.alternatives:
            return ops.sum(products)
        sums = ops.segment_sum(products, self.owners, num_segments=self.alternatives + 1)
        return sums[0] + ops.max(sums[1:])

    def sums(self, sizes: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum that always counts and the alternatives, in NumPy, float64."""
        products = self.coefficients * sizes[self.indices].prod(axis=1)
        found = np.bincount(self.owners, products, minlength=self.alternatives + 1)
        return float(found[0]), found[1:]

    def exact(self, sizes: np.ndarray) -> float:
        """The value in NumPy, float64."""
        if not self.alternatives:
            return float(self.coefficients @ sizes[self.indices].prod(axis=1))
        always, others = self.sums(sizes)
        return always + float(others.max())


_ONE = 0  # the size that is always 1, for products of fewer sizes than others


class Sizes:
    """The sizes of a model, functions of them, and the presence of its residual branches.

    Each is stored once. A function of a size has a number like the sizes themselves.
    Sizes are numbered from 0; the presence factors lie behind all of them and are numbered from
    the end: -1, -2...

    Attributes:
        channels: The channel graph.
        branches: Residual branches that may be removed as a whole.

    Args:
        channels: A channel graph.
    """

    def __init__(self, channels: ChannelGraph) -> None:
        self.channels = channels
        self.branches = Branches(channels)
        self._deciding = sorted(self.branches.removable)
        self._numbers: dict[bytes, int] = {b"": _ONE}
        self._fixed: list[float] = [1.0]
        self._members: list[np.ndarray] = [np.zeros(0, int)]
        self._counts: list[np.ndarray] = [np.zeros(0)]
        self._curves: dict[int, Curve] = {}

    def presence(self, groups: Iterable[int]) -> list[int]:
        """Numbers of the presence factors of groups that may close completely."""
        return [-1 - self._deciding.index(group) for group in groups]

    def term(self, product: Sequence[Factor], factors: Sequence[int] = ()) -> Term:
        """A product of extents, functions of them, and sizes that have a number already."""
        coefficient, sizes = 1.0, [*factors]
        for factor in product:
            extent = factor.extent if isinstance(factor, Curved) else factor
            curve = factor.curve if isinstance(factor, Curved) else None
            if isinstance(extent, np.ndarray):
                sizes.append(self._number(self.channels.neurons(extent), curve))
            else:
                coefficient *= extent if curve is None else curve.at(extent)
        return coefficient, tuple(sizes)

    def complete(self) -> None:
        """Prepares the evaluation; no term can be added afterwards."""
        self._gather = np.concatenate(self._members).astype("int32")
        owners = np.repeat(np.arange(len(self._members)), [len(m) for m in self._members])
        self._owner = owners.astype("int32")
        self._weight = np.concatenate(self._counts)
        self._offset = np.array(self._fixed)
        self._deciding_neurons = self._padded_members()
        self._curved = np.array(list(self._curves), "int32")
        self._of_curved = Curves(list(self._curves.values()))
        # Where each size stands once the values of curves are appended.
        self._place = np.arange(len(self._fixed), dtype="int32")
        self._place[self._curved] = len(self._fixed) + np.arange(len(self._curved))

    def stack(self, terms: Sequence[Term], alternatives: Sequence[Sequence[Term]] = ()) -> Stack:
        """A sum of products, with alternatives the largest of which counts beside it."""
        owners = np.repeat(
            np.arange(1 + len(alternatives), dtype="int32"),
            [len(terms), *(len(others) for others in alternatives)],
        )
        terms = [*terms, *itertools.chain(*alternatives)]
        total = len(self._fixed) + len(self._deciding)
        width = max([1, *(len(sizes) for _, sizes in terms)])
        indices = np.full((len(terms), width), _ONE, "int32")
        for row, (_, sizes) in enumerate(terms):
            indices[row, : len(sizes)] = [size % total for size in sizes]
        coefficients = np.array([coefficient for coefficient, _ in terms], float)
        return Stack(coefficients, indices, owners, len(alternatives))

    def tensor(self, openness: Any) -> Any:
        """All sizes, differentiable, in the element type of `openness` (float32 or float64)."""
        dtype = openness.dtype
        openness = self.channels.features.tensor(openness)
        open_counts = ops.take(openness, self._gather) * ops.cast(self._weight, dtype)
        summed = ops.segment_sum(open_counts, self._owner, num_segments=len(self._fixed))
        sizes = summed + ops.cast(self._offset, dtype)
        if self._curves:
            values = self._of_curved.tensor(ops.take(sizes, self._curved))
            sizes = ops.take(ops.concatenate([sizes, values]), self._place)
        if not self._deciding:
            return sizes
        members = ops.take(ops.append(openness, ops.zeros(1, dtype)), self._deciding_neurons)
        return ops.concatenate([sizes, 1.0 - ops.prod(1.0 - members, axis=1)])

    def exact(self, openness: np.ndarray) -> np.ndarray:
        """All sizes in NumPy, float64."""
        openness = self.channels.features.exact(openness)
        open_counts = openness[self._gather] * self._weight
        sizes = self._offset + np.bincount(self._owner, open_counts, minlength=len(self._fixed))
        if self._curves:
            sizes[self._curved] = self._of_curved.exact(sizes[self._curved])
        members = np.append(openness, 0.0)[self._deciding_neurons]
        return np.concatenate([sizes, 1.0 - np.prod(1.0 - members, axis=1)])

    def _number(self, neurons: np.ndarray, curve: Curve | None = None) -> int:
        """The number of a size, or of a function of it; equal for equal neurons and functions."""
        members, counts = np.unique(neurons, return_counts=True)
        prunable = members < self.channels.num_neurons
        fixed = float(counts[~prunable].sum())
        members, counts = members[prunable], counts[prunable].astype(float)
        key = members.tobytes() + counts.tobytes() + np.float64(fixed).tobytes()
        key += repr(curve).encode()
        if key not in self._numbers:
            self._numbers[key] = len(self._fixed)
            self._fixed.append(fixed)
            self._members.append(members)
            self._counts.append(counts)
            if curve is not None:
                self._curves[self._numbers[key]] = curve
        return self._numbers[key]

    def _padded_members(self) -> np.ndarray:
        """The neurons of each deciding group, padded with the neuron that is never open."""
        groups = [self.channels.groups[g] for g in self._deciding]
        shape = (len(groups), max([1, *(group.size for group in groups)]))
        members = np.full(shape, self.channels.num_neurons, "int32")
        for row, group in zip(members, groups, strict=True):
            row[: group.size] = group.neurons
        return members[::-1]
