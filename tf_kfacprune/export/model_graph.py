"""Tensors and operations of a .tflite file, in the order in which a runtime runs them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.flatbuffer import (
    byte_vector,
    int_vector,
    table_fields,
    table_list,
    target_of,
    u32,
)
from tf_kfacprune.export.model_file import root_fields

__all__ = ["FileGraph", "FileOperation", "FileTensor", "read_graph"]

# Bytes per value, by the number of the type in the schema: float32, float16, int32, uint8, int64,
# bool, int16, int8, float64, uint64, uint32, uint16. A type that is not here (strings, int4) counts
# as one byte per value.
_BYTES = {0: 4, 1: 2, 2: 4, 3: 1, 4: 8, 6: 1, 7: 2, 9: 1, 10: 8, 12: 8, 15: 4, 16: 2}


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file.

    Attributes:
        shape: its shape; a free batch size is 1.
        kind: number of its type in the schema: 0 for float32, 7 for int16, 9 for int8.
        bytes: bytes of its values.
        is_constant: whether the file holds its values.
        scales: number of scales that it is quantized with, 0 for a tensor in float.
    """

    shape: tuple[int, ...]
    kind: int
    bytes: int
    is_constant: bool
    scales: int


@dataclass(frozen=True)
class FileOperation:
    """One operation of the file.

    Attributes:
        code: number of the builtin operation in the schema.
        inputs: numbers of the tensors that it reads; -1 for an optional one that is left out.
        outputs: numbers of the tensors that it writes.
    """

    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class FileGraph:
    """The main graph of a file.

    Attributes:
        tensors: all tensors.
        operations: all operations, in order.
        inputs: numbers of the tensors that are given.
        outputs: numbers of the tensors that are asked for.
        has_subgraphs: whether there are other graphs, such as the body of a loop.
        names: number of tensor -> name of the input or output that it is in the file's signature.
    """

    tensors: tuple[FileTensor, ...]
    operations: tuple[FileOperation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    has_subgraphs: bool
    names: dict[int, str]


def read_graph(content: bytes) -> FileGraph:
    """The main graph of a ``.tflite`` file.

    Args:
        content: the whole file.

    Returns:
        Its tensors and operations.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or is damaged.

    References:
        Tables ``SubGraph``, ``Tensor``, ``Operator`` and ``SignatureDef`` of the TFLite schema,
        tensorflow/compiler/mlir/lite/schema/schema.fbs.
    """
    root = root_fields(content)
    try:
        codes = [_code(content, table) for table in table_list(content, root["operator_codes"])]
        held = [_is_filled(content, table) for table in table_list(content, root["buffers"])]
        graphs = table_list(content, root["subgraphs"])
        tensors, inputs, outputs, operators = _padded(content, graphs[0], 4)
        return FileGraph(
            tuple(_tensor(content, table, held) for table in table_list(content, tensors)),
            tuple(_operation(content, table, codes) for table in table_list(content, operators)),
            tuple(int_vector(content, inputs)),
            tuple(int_vector(content, outputs)),
            len(graphs) > 1,
            _names(content, root["signature_defs"]),
        )
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ExportError(f"The content of the .tflite file is damaged: {error}.") from error


def _names(content: bytes, signatures: int) -> dict[int, str]:
    """Names of the first signature's inputs and outputs."""
    names: dict[int, str] = {}
    for table in table_list(content, signatures)[:1]:
        for field in _padded(content, table, 2):
            for entry in table_list(content, field):
                name, tensor = _padded(content, entry, 2)
                number = u32(content, tensor) if tensor else 0
                names[number] = byte_vector(content, target_of(content, name)).decode()
    return names


def _padded(content: bytes, table: int, count: int) -> list[int]:
    """The first fields of a table; 0 for absent ones."""
    fields = table_fields(content, table)
    return [*fields, *[0] * count][:count]


def _code(content: bytes, table: int) -> int:
    """An old file holds the number in one byte, a new one in the fourth field or in both."""
    old, _, _, new = _padded(content, table, 4)
    return max(content[old] if old else 0, u32(content, new) if new else 0)


def _is_filled(content: bytes, buffer: int) -> bool:
    """Whether a buffer holds values: in the file, or behind it (fields 1 and 2: where)."""
    data, offset, _ = _padded(content, buffer, 3)
    return (data and u32(content, target_of(content, data)) > 0) or bool(offset)


def _tensor(content: bytes, table: int, held: list[bool]) -> FileTensor:
    shape, type_, buffer, _, quantization = _padded(content, table, 5)
    kind = content[type_] if type_ else 0
    sizes = tuple(int_vector(content, shape))
    scales = 0
    if quantization:
        _, _, scale, _ = _padded(content, target_of(content, quantization), 4)
        scales = len(int_vector(content, scale))
    return FileTensor(
        sizes,
        kind,
        math.prod(sizes) * _BYTES.get(kind, 1),
        held[u32(content, buffer) if buffer else 0],
        scales,
    )


def _operation(content: bytes, table: int, codes: list[int]) -> FileOperation:
    code, inputs, outputs = _padded(content, table, 3)
    return FileOperation(
        codes[u32(content, code) if code else 0],
        tuple(int_vector(content, inputs)),
        tuple(int_vector(content, outputs)),
    )
