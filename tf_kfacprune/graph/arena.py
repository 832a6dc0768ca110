"""Bytes of the tensor arena in which TensorFlow Lite Micro runs the int8 file, batch 1.

    arena = records + max( max_k sum over activations alive in operation k of their bytes,
                           working memory while the file is prepared )

An activation lives from the operation that writes it to the last one that reads it. Each is rounded
up to 16 bytes. Records and working memory are those of `runtime_records`. All are sums of products
of sizes, so that the arena is a maximum of such sums. That activations reach their peak, without
gaps, is what `export.memory_plan` sees to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tf_kfacprune.graph import runtime_records as sizes
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.int8_operations import Buffer, Step
from tf_kfacprune.graph.int8_steps import Int8Steps
from tf_kfacprune.graph.rules import Extent

__all__ = ["ArenaBytes", "Part"]

# Records were fitted to within 20 bytes; so much more is counted, so that the arena is enough.
_MARGIN = 32
# In networks of more weighted layers than this, working memory is counted from above.
_MOST_PREPARED = 64


@dataclass(frozen=True)
class Part:
    """One product in a sum of bytes.

    Attributes:
        product: A coefficient and extents.
        call: The call without which it is 0; None if it is always there.
    """

    product: tuple[Extent | float, ...]
    call: Call | None


class ArenaBytes:
    """The sums that the arena is made of.

    Args:
        operations: The operations of the file.
    """

    def __init__(self, operations: Int8Steps) -> None:
        self._operations = operations
        self._steps = operations.steps

    def records(self) -> Iterator[Part]:
        """What is kept all the time."""
        inputs = len(self._operations.inputs)
        yield Part((_MARGIN + sizes.FIXED + sizes.QUANTIZED + sizes.TENSOR * inputs,), None)
        yield Part((sizes.OUTPUT * (len(self._operations.outputs) - 1),), None)
        for _ in self._operations.selections:
            yield Part((sizes.OPERATION + sizes.OTHER_KERNEL + 2 * sizes.TENSOR,), None)
        for step in self._steps:
            kernel = sizes.KERNELS.get(step.kernel, sizes.OTHER_KERNEL)
            tensors = sizes.TENSOR * (1 + step.constants)
            yield Part((sizes.OPERATION + kernel + tensors,), step.call)
            if step.channels is not None:
                yield Part((sizes.CHANNEL, step.channels), step.call)
                if not _is_whole(step.channels):
                    yield Part((sizes.CHANNEL_ROUNDING,), step.call)

    def alternatives(self) -> Iterator[tuple[str, list[Part]]]:
        """What lies beside the records at one time or another, with what happens then."""
        for step, alive in zip(self._steps, self._alive(), strict=True):
            parts = [Part(buffer.size, buffer.maker) for buffer in alive]
            parts += [Part((b.padding,), b.maker) for b in alive if b.padding]
            yield step.call.path, parts
        for everything, selected in self._operations.selections:
            yield "the choice of inputs", [Part(b.size, None) for b in (everything, selected)]
        yield from self._prepared()

    def _alive(self) -> Iterator[list[Buffer]]:
        """The activations that live during each operation."""
        first = {id(buffer): -1 for buffer in self._operations.inputs}
        last = dict(first)
        buffers = {id(buffer): buffer for buffer in self._operations.inputs}
        for number, step in enumerate(self._steps):
            for buffer in (step.writes, *step.reads, *step.scratch):
                buffers[id(buffer)] = buffer
                first.setdefault(id(buffer), number)
                last[id(buffer)] = number
        for buffer in self._operations.outputs:
            last[id(buffer)] = len(self._steps)
        for number in range(len(self._steps)):
            yield [b for key, b in buffers.items() if first[key] <= number <= last[key]]

    def _prepared(self) -> Iterator[tuple[str, list[Part]]]:
        """Working memory while the file is prepared, less the records that do not exist yet."""
        each = sizes.PLANNED_TENSOR + sizes.PLANNED_ACTIVATION
        planned = [Part((sizes.PLANNED + each * len(self._operations.inputs),), None)]
        for step in self._steps:
            activations = 1 + len(step.scratch)
            count = sizes.PLANNED_TENSOR * (activations + step.constants)
            planned.append(Part((count + sizes.PLANNED_ACTIVATION * activations,), step.call))
        yield "planning", planned
        weighted = [step for step in self._steps if step.channels is not None]
        for number, step in enumerate(weighted):
            parts = [
                Part((sizes.PREPARED_PER_CHANNEL,), step.call),
                Part((sizes.CHANNEL, _channels(step)), step.call),
            ]
            if len(weighted) <= _MOST_PREPARED:
                parts += [
                    Part((-sizes.CHANNEL, _channels(later)), later.call)
                    for later in weighted[number + 1 :]
                ]
            yield f"preparing {step.call.path}", parts


def _is_whole(channels: Extent) -> bool:
    """Whether lists of 4 bytes per channel fill 16 bytes, however many neurons are left."""
    return isinstance(channels, int) and channels % 4 == 0


def _channels(step: Step) -> Extent:
    return 0 if step.channels is None else step.channels
