"""Tensors and operations of a .tflite file, in the order in which a runtime runs them.

References:
    tables ``SubGraph``, ``Tensor``, ``QuantizationParameters``, ``Operator``, ``OperatorCode`` and
    ``SignatureDef`` of the TFLite schema, tensorflow/compiler/mlir/lite/schema/schema.fbs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from types import MappingProxyType

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.flatbuffer import (
    byte_string,
    fields,
    integers,
    numbers,
    tables,
    target,
    u32,
)
from tf_kfacprune.export.model_file import root_fields
from tf_kfacprune.export.operators import operator_name

__all__ = ["FileGraph", "FileOperation", "GraphTensor", "read_graph"]

# By their codes in the schema, from 0.
_TYPES = """
    float32 float16 int32 uint8 int64 string bool int16 complex64 int8 float64 complex128 uint64
    resource variant uint32 uint16 int4 bfloat16 int2 uint4
"""
# Bytes per value. A type that is not here (strings, int4) counts as one byte per value.
_BYTES = MappingProxyType(
    {
        **dict.fromkeys(("int64", "float64", "uint64"), 8),
        **dict.fromkeys(("float32", "int32", "uint32"), 4),
        **dict.fromkeys(("float16", "int16", "uint16"), 2),
    }
)
_CUSTOM = "CUSTOM"


@dataclass(frozen=True)
class GraphTensor:
    """One tensor of the file.

    Attributes:
        name: its own name, which need not be that in the signature.
        dtype: element type.
        shape: its shape, where a free size is 1.
        free: which axes have a free size.
        scales: real values of one step of a quantized tensor, one for all or one per channel; none
            for a tensor in float.
        zero_points: the quantized values of zero, likewise.
        is_constant: whether the file holds its values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    free: tuple[int, ...]
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    is_constant: bool

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class FileOperation:
    """One operation of the file.

    Attributes:
        operator: name of its operator in the schema, such as ``CONV_2D``; of a custom one its own.
        inputs: numbers of the tensors that it reads; -1 for an optional one that is left out.
        outputs: numbers of the tensors that it writes.
    """

    operator: str
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
        operators: names of the operators that the file lists, those of other graphs too.
        input_names: number of tensor -> name of the input that it is in the file's signature.
        output_names: likewise for outputs.
    """

    tensors: tuple[GraphTensor, ...]
    operations: tuple[FileOperation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    has_subgraphs: bool
    operators: tuple[str, ...]
    input_names: dict[int, str]
    output_names: dict[int, str]


def read_graph(content: bytes) -> FileGraph:
    """The main graph of a ``.tflite`` file, which is the one that is run.

    Args:
        content: the whole file.

    Returns:
        Its tensors and operations.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or is damaged.
    """
    try:
        root = root_fields(content)
        operators = tuple(
            _operator(content, code) for code in tables(content, root["operator_codes"])
        )
        held = [_is_filled(content, buffer) for buffer in tables(content, root["buffers"])]
        graphs = tables(content, root["subgraphs"])
        tensors, inputs, outputs, operations = fields(content, graphs[0], 4)
        input_names, output_names = _signature_names(content, root["signature_defs"])
        return FileGraph(
            tuple(_tensor(content, table, held) for table in tables(content, tensors)),
            tuple(_operation(content, table, operators) for table in tables(content, operations)),
            integers(content, inputs),
            integers(content, outputs),
            len(graphs) > 1,
            operators,
            input_names,
            output_names,
        )
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ExportError(f"The content of the .tflite file is damaged: {error}.") from error


def _signature_names(content: bytes, field: int) -> tuple[dict[int, str], dict[int, str]]:
    """Names of inputs and outputs in the first signature, by the number of the tensor."""
    names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for signature in tables(content, field)[:1]:
        for side, entries in enumerate(fields(content, signature, 2)):
            for entry in tables(content, entries):
                name, index = fields(content, entry, 2)
                number = u32(content, index) if index else 0
                names[side][number] = _text(content, name)
    return names


def _operator(content: bytes, table: int) -> str:
    # Codes up to 127 are in the field of older schemas, and greater ones in the new field only.
    old, custom, _, new = fields(content, table, 4)
    name = operator_name(max(content[old] if old else 0, u32(content, new) if new else 0))
    return _text(content, custom) if name == _CUSTOM else name


def _is_filled(content: bytes, buffer: int) -> bool:
    """Whether a buffer holds values: in the file, or behind it (fields 1 and 2: where)."""
    data, offset, _ = fields(content, buffer, 3)
    return (data and u32(content, target(content, data)) > 0) or bool(offset)


def _tensor(content: bytes, table: int, held: list[bool]) -> GraphTensor:
    shape, dtype, buffer, name, quantization, _, _, signature = fields(content, table, 8)
    sizes = integers(content, shape)
    declared = integers(content, signature) or sizes
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    if quantization:
        _, _, scale, zero_point = fields(content, target(content, quantization), 4)
        scales = numbers(content, scale, "f")
        zero_points = integers(content, zero_point, "q")
    return GraphTensor(
        _text(content, name),
        _TYPES.split()[content[dtype] if dtype else 0],
        sizes,
        tuple(axis for axis, size in enumerate(declared) if size < 0),
        scales,
        zero_points,
        held[u32(content, buffer) if buffer else 0],
    )


def _operation(content: bytes, table: int, operators: tuple[str, ...]) -> FileOperation:
    code, inputs, outputs = fields(content, table, 3)
    return FileOperation(
        operators[u32(content, code) if code else 0],
        integers(content, inputs),
        integers(content, outputs),
    )


def _text(content: bytes, field: int) -> str:
    return byte_string(content, target(content, field)).decode()
