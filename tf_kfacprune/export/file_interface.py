"""What a program must know of a .tflite file to run it: inputs, outputs and operators.

Programs in C number inputs and outputs by their place in the file; programs that use a signature
name them. Neither need be the order of the Keras model.

References:
    tables ``SubGraph``, ``Tensor``, ``QuantizationParameters``, ``OperatorCode`` and
    ``SignatureDef`` of the TFLite schema, tensorflow/compiler/mlir/lite/schema/schema.fbs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.flatbuffer import byte_string, fields, numbers, tables, target, u32
from tf_kfacprune.export.model_file import root_fields
from tf_kfacprune.export.operators import operator_name

__all__ = ["FileInterface", "FileTensor", "read_interface"]

# By their codes in the schema, from 0.
_TYPES = (
    "float32",
    "float16",
    "int32",
    "uint8",
    "int64",
    "string",
    "bool",
    "int16",
    "complex64",
    "int8",
    "float64",
    "complex128",
    "uint64",
    "resource",
    "variant",
    "uint32",
    "uint16",
    "int4",
    "bfloat16",
    "int2",
    "uint4",
)
_CUSTOM = "CUSTOM"


@dataclass(frozen=True)
class FileTensor:
    """One input or output of a file.

    Attributes:
        name: its name in the signature; that of the tensor, if the file has none.
        dtype: element type.
        shape: sizes in the file, where a free size is 1.
        free: which axes have a free size.
        scale: real value of one step of a quantized tensor; None if it is not quantized.
        zero_point: the quantized value of zero; None likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    free: tuple[int, ...] = ()
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class FileInterface:
    """Inputs, outputs and operators of a file.

    Attributes:
        inputs: in the order of the file, which is that of ``interpreter->input(i)``.
        outputs: likewise.
        operators: names of the operators it uses, each once; of custom ones their own names.
    """

    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]
    operators: tuple[str, ...]


def read_interface(content: bytes) -> FileInterface:
    """Inputs, outputs and operators of a ``.tflite`` file.

    Args:
        content: the whole file.

    Returns:
        What its first subgraph, which is the one that is run, takes and returns.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file.
    """
    try:
        root = root_fields(content)
        subgraph = _padded(content, tables(content, root["subgraphs"])[0], 3)
        tensors = tables(content, subgraph[0])
        names = _signature_names(content, root["signature_defs"])
        sides = [
            tuple(
                _tensor(content, tensors[int(index)], names[side].get(int(index)))
                for index in numbers(content, subgraph[1 + side], "i")
            )
            for side in (0, 1)
        ]
        codes = [_operator(content, code) for code in tables(content, root["operator_codes"])]
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ExportError(f"The content of the .tflite file is damaged: {error}.") from error
    return FileInterface(sides[0], sides[1], tuple(dict.fromkeys(codes)))


def _signature_names(content: bytes, field: int) -> tuple[dict[int, str], dict[int, str]]:
    """Names of inputs and outputs in the first signature, by the number of the tensor."""
    names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for signature in tables(content, field)[:1]:
        for side, entries in enumerate(_padded(content, signature, 2)[:2]):
            for entry in tables(content, entries):
                name, index = _padded(content, entry, 2)[:2]
                number = u32(content, index) if index else 0
                names[side][number] = byte_string(content, target(content, name)).decode()
    return names


def _tensor(content: bytes, table: int, name: str | None) -> FileTensor:
    shape, dtype, _, own_name, quantization, _, _, signature = _padded(content, table, 8)[:8]
    sizes = tuple(int(size) for size in numbers(content, shape, "i"))
    declared = numbers(content, signature, "i") or sizes
    scales: tuple[float, ...] = ()
    zero_points: tuple[float, ...] = ()
    if quantization:
        scaling = _padded(content, target(content, quantization), 4)
        scales = numbers(content, scaling[2], "f")
        zero_points = numbers(content, scaling[3], "q")
    return FileTensor(
        byte_string(content, target(content, own_name)).decode() if name is None else name,
        _TYPES[content[dtype] if dtype else 0],
        sizes,
        tuple(axis for axis, size in enumerate(declared) if size < 0),
        scales[0] if scales else None,
        int(zero_points[0]) if zero_points else (0 if scales else None),
    )


def _operator(content: bytes, table: int) -> str:
    # Codes up to 127 are in the field of older schemas, and greater ones in the new field only.
    old, custom, _, new = _padded(content, table, 4)[:4]
    code = max(content[old] if old else 0, u32(content, new) if new else 0)
    name = operator_name(code)
    return byte_string(content, target(content, custom)).decode() if name == _CUSTOM else name


def _padded(content: bytes, table: int, count: int) -> list[int]:
    """Positions of at least `count` fields of a table; a file leaves absent ones out at its end."""
    found = fields(content, table)
    return found + [0] * (count - len(found))
