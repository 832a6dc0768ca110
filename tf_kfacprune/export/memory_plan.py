"""Where the activations of a .tflite file lie in the tensor arena of TensorFlow Lite Micro.

A tensor lives from the operation that writes it to the last one that reads it; the arena must hold
those that live at the same time beside each other. The runtime places them by itself, largest
first, each at the lowest place that is free for as long as it lives. Ties are broken from the last
tensor to the first, which for equal tensors across residual blocks leaves gaps: it takes four
activations for ResNet-20, of which never more than three live together.

A file can say where they are to lie instead, in an entry that the runtime obeys and other
interpreters ignore (``OfflineMemoryAllocation``: version, graph, number of tensors, then an offset
for each tensor, -1 for what is not placed). `with_memory_plan` adds it where it saves memory.

References:
    tensorflow/lite/micro/memory_planner/greedy_memory_planner.cc and
    tensorflow/lite/micro/docs/memory_management.md of tflite-micro.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tf_kfacprune.export.model_file import add_entry, read_entries
from tf_kfacprune.export.model_graph import FileGraph, FileOperation, read_graph
from tf_kfacprune.graph.runtime_records import LISTS, SUM, WITH_SUMS

__all__ = ["Lifetimes", "aligned", "lifetimes", "planned_bytes", "with_memory_plan"]

_ENTRY = "OfflineMemoryAllocation"
_VERSION, _MAIN_GRAPH, _NOT_PLACED = 1, 0, -1
_ALIGNMENT = 16
# Changes of the order that are tried where simple rules leave gaps; fewer of many tensors, for each
# compares all of them with each other.
_ATTEMPTS, _COMPARISONS = 2000, 8_000_000


@dataclass(frozen=True)
class Lifetimes:
    """What has to be placed.

    Working memory of operations has negative numbers: no file can say where it is to lie.

    Attributes:
        sizes: bytes by number of tensor, rounded up to 16.
        first: the operation that writes it, counted from 1; 0 for inputs.
        last: the last operation that reads it; the last of all for outputs.
    """

    sizes: dict[int, int]
    first: dict[int, int]
    last: dict[int, int]

    @property
    def peak(self) -> int:
        """The most bytes that live together: no plan needs less."""
        steps = range(max(self.last.values(), default=-1) + 1)
        return max((sum(self.sizes[i] for i in self.alive(step)) for step in steps), default=0)

    def alive(self, step: int) -> list[int]:
        """The tensors that live during an operation."""
        return [i for i in self.sizes if self.first[i] <= step <= self.last[i]]

    def placed(
        self, order: Iterable[int], offsets: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """Offsets of the tensors, each at the lowest free place, in this order.

        Args:
            order: numbers of the tensors.
            offsets: those of others, which lie already.
        """
        offsets = dict(offsets or {})
        taken = [(offset, offset + self.sizes[i], i) for i, offset in offsets.items()]
        for tensor in order:
            offset = 0
            for begin, end, other in sorted(taken):
                if self.first[tensor] > self.last[other] or self.first[other] > self.last[tensor]:
                    continue
                if begin - offset >= self.sizes[tensor]:
                    break
                offset = max(offset, end)
            offsets[tensor] = offset
            taken.append((offset, offset + self.sizes[tensor], tensor))
        return offsets

    def height(self, offsets: dict[int, int]) -> int:
        """Bytes that placed tensors take."""
        return max((offset + self.sizes[i] for i, offset in offsets.items()), default=0)


def lifetimes(graph: FileGraph) -> Lifetimes:
    """Sizes and lifetimes of the activations of a file's main graph."""
    first = dict.fromkeys(graph.inputs, 0)
    last = dict.fromkeys(graph.inputs, 0)
    for step, operation in enumerate(graph.operations, start=1):
        for tensor in operation.outputs:
            first.setdefault(tensor, step)
            last[tensor] = step
        for tensor in operation.inputs:
            if tensor in first:  # the others are constants, which stay in the file
                last[tensor] = step
    for tensor in graph.outputs:
        last[tensor] = len(graph.operations)
    sizes = {tensor: aligned(graph.tensors[tensor].bytes) for tensor in sorted(first)}
    for step, operation in enumerate(graph.operations, start=1):
        for size in _working_memory(graph, operation):
            number = -1 - len(sizes)
            sizes[number], first[number], last[number] = aligned(size), step, step
    return Lifetimes(sizes, first, last)


def aligned(size: int) -> int:
    """Bytes, rounded up to 16, as the runtime places everything."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _working_memory(graph: FileGraph, operation: FileOperation) -> Iterator[int]:
    """Bytes that an operation asks for while it runs."""
    yield from LISTS.get(operation.operator, ())
    result = graph.tensors[operation.outputs[0]]
    if operation.operator in WITH_SUMS and result.dtype == "int8":
        yield SUM * result.bytes


def planned_bytes(content: bytes) -> int:
    """Bytes of activations as the runtime places them: by the file's plan, or by its own rule.

    Args:
        content: the whole ``.tflite`` file.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or is damaged.
    """
    living = lifetimes(read_graph(content))
    plan = read_entries(content).get(_ENTRY)
    if plan is None:
        return living.height(living.placed(_order_of_runtime(living)))
    offsets = struct.unpack(f"<{len(plan) // 4}i", plan)[3:]
    told = {i: offset for i, offset in enumerate(offsets) if offset >= 0}
    rest = [i for i in _order_of_runtime(living) if i not in told]
    return living.height(living.placed(rest, told))


def with_memory_plan(content: bytes) -> bytes:
    """A ``.tflite`` file with a plan for its activations, if that saves memory.

    Args:
        content: the whole file.

    Returns:
        The content of the new file, or ``content`` if the runtime's own plan is as good, there is
        a plan already, or graphs beside the main one, whose tensors live in the arena too.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or is damaged.
    """
    graph = read_graph(content)
    if graph.has_subgraphs or _ENTRY in read_entries(content):
        return content
    living = lifetimes(graph)
    own = living.height(living.placed(_order_of_runtime(living)))
    if own == living.peak:
        return content
    plan = _lowest(living)
    if living.height(plan) >= own:
        return content
    offsets = [plan.get(tensor, _NOT_PLACED) for tensor in range(len(graph.tensors))]
    words = [_VERSION, _MAIN_GRAPH, len(offsets), *offsets]
    return add_entry(content, _ENTRY, struct.pack(f"<{len(words)}i", *words))


def _order_of_runtime(living: Lifetimes) -> list[int]:
    return sorted(living.sizes, key=lambda i: (-living.sizes[i], -i))


def _lowest(living: Lifetimes) -> dict[int, int]:
    """Offsets by which the tensors take least, of many orders of placing them.

    Orders by simple rules first. Where all of them leave gaps, the best one is improved: one tensor
    after another is placed earlier or later, and stays there if no more memory is taken; at random,
    but in the same way at every call.
    """
    order = min(_orders(living), key=lambda order: living.height(living.placed(order)))
    plan = living.placed(order)
    height, random = living.height(plan), np.random.default_rng(0)
    movable = sum(tensor >= 0 for tensor in order)  # working memory is placed by the runtime, last
    for _ in range(min(_ATTEMPTS, _COMPARISONS // len(order) ** 2)):
        if height == living.peak:
            break
        other = list(order)
        other.insert(random.integers(movable), other.pop(random.integers(movable)))
        moved = living.placed(other)
        if living.height(moved) <= height:
            order, plan, height = other, moved, living.height(moved)
    return plan


def _orders(living: Lifetimes) -> Iterator[list[int]]:
    """Orders of placing by simple rules."""
    sizes, first, last = living.sizes, living.first, living.last
    keys = (
        lambda i: (-sizes[i], first[i]),
        lambda i: (-sizes[i], -last[i]),
        lambda i: (first[i] - last[i], -sizes[i]),
        lambda i: (first[i], -sizes[i]),
        lambda i: (-last[i], -sizes[i]),
    )
    for key in keys:
        by_key = sorted(sizes, key=key)
        yield sorted(by_key, key=lambda i: i < 0)
