"""Memory that a .tflite file needs on a microcontroller: the tensor arena.

The interpreter there, TensorFlow Lite Micro, works in a block of memory of fixed size, which must
hold all activations that live at the same time and, behind them, the runtime's own records. With
the runtime's package installed (extra ``[micro]``) it is asked: it runs the file and says what it
has allocated. While it prepares a file it needs working memory, too, which for a small network can
be more than the activations; so the size it names is tried, and raised until the file runs in it.

Without the package the size is computed: activations as the runtime places them (`memory_plan`),
records and working memory by `arena_records`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.arena_records import record_bytes, working_bytes
from tf_kfacprune.export.memory_plan import planned_bytes
from tf_kfacprune.export.model_graph import read_graph
from tf_kfacprune.export.running import has_micro, micro_job

__all__ = [
    "Arena",
    "activation_bytes",
    "arena_bytes",
    "arena_of",
    "estimated_arena",
]

_ALIGNMENT = 16
# The arena in which a file is measured, beside what its activations need.
_ROOM = 16_000_000
# A size that is not enough is raised by one part of so many.
_STEP = 64


@dataclass(frozen=True)
class Arena:
    """The tensor arena of a file.

    Attributes:
        bytes: its least size, a multiple of 16; 0 if the runtime cannot run the file.
        activations: bytes of it that hold activations.
        records: bytes of it that hold what the runtime keeps beside them.
        is_measured: whether TensorFlow Lite Micro said so; else it is an estimate.
        lacking: operations of the file that the runtime does not have.
    """

    bytes: int
    activations: int
    records: int
    is_measured: bool
    lacking: tuple[str, ...] = ()


def activation_bytes(file: str | os.PathLike[str]) -> int:
    """Bytes that the activations of one inference need, the larger part of the tensor arena.

    Args:
        file: a ``.tflite`` file; a free batch size counts as 1.

    Returns:
        Bytes, each tensor rounded up to 16, placed as TensorFlow Lite Micro does or as the file
        says.

    Raises:
        ExportError: if the file is missing or damaged.
    """
    return planned_bytes(_content(file))


def arena_bytes(file: str | os.PathLike[str]) -> int:
    """Bytes of a tensor arena in which TensorFlow Lite Micro can run a file.

    Measured by running it there, where the runtime is installed (extra ``[micro]``, Linux x86-64);
    else an estimate. Both are for the reference kernels. Kernels made for a processor, such as
    CMSIS-NN, may want scratch buffers: add some kilobytes there and read
    `MicroInterpreter::arena_used_bytes`.

    Args:
        file: a ``.tflite`` file; a free batch size counts as 1.

    Returns:
        Bytes, a multiple of 16.

    Raises:
        ExportError: if the file is missing or damaged, or the runtime cannot run it.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.export.arena_bytes("net.tflite")  # doctest: +SKIP
        6640
    """
    arena = arena_of(file)
    if arena.lacking:
        raise ExportError(
            f"{file} cannot be run by TensorFlow Lite Micro, which lacks "
            f"{', '.join(arena.lacking)}. Build the model without the layers that need it."
        )
    return arena.bytes


def arena_of(file: str | os.PathLike[str]) -> Arena:
    """The tensor arena of a file, measured or else estimated.

    Raises:
        ExportError: if the file is missing or damaged, or the runtime cannot run it for another
            reason than an operation that it lacks.
    """
    content = _content(file)
    if not has_micro():
        return estimated_arena(content)
    graph = read_graph(content)
    room = _ROOM + 2 * planned_bytes(content)
    job = {"file": os.fspath(file), "arena": room, "names": [str(i) for i in graph.inputs]}
    found = micro_job("measure", job, what=str(file))
    lacking = tuple(str(name) for name in found["lacking"])
    if lacking:
        return Arena(0, 0, 0, True, lacking)
    sizes = {name: int(found[name]) for name in ("total", "head", "tail")}
    least = _least_that_runs(job, sizes["total"], estimated_arena(content).bytes)
    return Arena(least, sizes["head"], sizes["tail"], True)


def _least_that_runs(job: dict[str, object], named: int, expected: int) -> int:
    """The first size in which the file runs: the one named, the one expected, then larger ones."""
    size = -(-named // _ALIGNMENT) * _ALIGNMENT
    while size < _ROOM:
        try:
            micro_job("run", {**job, "arena": size, "outputs": 0}, what="")
            return size
        except ExportError:
            raised = size + max(_ALIGNMENT, size // _STEP // _ALIGNMENT * _ALIGNMENT)
            size = expected if size < expected else raised
    raise ExportError(
        f"{job['file']} runs in an arena of {job['arena']} bytes, but in none up to {_ROOM}: no "
        "least size of its arena was found."
    )


def estimated_arena(content: bytes) -> Arena:
    """The tensor arena of a file, computed from what is in it.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or is damaged.
    """
    graph, activations = read_graph(content), planned_bytes(content)
    records = record_bytes(graph)
    least = max(activations + records, working_bytes(graph))
    return Arena(-(-least // _ALIGNMENT) * _ALIGNMENT, activations, records, False)


def _content(file: str | os.PathLike[str]) -> bytes:
    path = Path(file)
    if not path.is_file():
        raise ExportError(f"{path}: no such file.")
    return path.read_bytes()
