"""A .tflite file as a C array, for microcontrollers without a file system.

The interpreter there works in a block of memory of fixed size, the tensor arena, which must hold
all activations that live at the same time. Their least size follows from the order of operations:
tensors are placed from the largest to the smallest at the lowest offset where no tensor alive at
the same time is, which is how TensorFlow Lite Micro plans its arena. What it keeps there besides
is estimated from above, by the sizes that its own allocator reports:

| record | bytes |
| --- | --- |
| interpreter, inputs and outputs | 1024 |
| each tensor | 24 |
| each operation, with the data of its kernel | 192 |
| each channel that is quantized with a scale of its own | 8 |
"""

from __future__ import annotations

import os
from pathlib import Path

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.atomic import write_bytes
from tf_kfacprune.export.c_header import check_name, header_text
from tf_kfacprune.export.running import litert_job

__all__ = ["activation_bytes", "arena_bytes", "c_array"]

_FIXED, _PER_TENSOR, _PER_OPERATION, _PER_CHANNEL = 1024, 24, 192, 8


def activation_bytes(file: str | os.PathLike[str]) -> int:
    """Bytes that the activations of one inference need, the larger part of the tensor arena.

    Args:
        file: a ``.tflite`` file; a free batch size counts as 1.

    Returns:
        Bytes, each tensor rounded up to 16.

    Raises:
        ExportError: if the file is missing or LiteRT cannot load it.
    """
    return _planned(file)["bytes"]


def arena_bytes(file: str | os.PathLike[str]) -> int:
    """Bytes of a tensor arena in which TensorFlow Lite Micro can run a file.

    Enough for its reference kernels. Kernels made for a processor, such as CMSIS-NN, may want
    scratch buffers: add some kilobytes there and read `MicroInterpreter::arena_used_bytes`.

    Args:
        file: a ``.tflite`` file; a free batch size counts as 1.

    Returns:
        Bytes: `activation_bytes` and an upper estimate of what is kept beside them.

    Raises:
        ExportError: if the file is missing or LiteRT cannot load it.

    Example:
        >>> import tf_kfacprune as kp
        >>> kp.export.arena_bytes("net.tflite")  # doctest: +SKIP
        6720
    """
    found = _planned(file)
    records = (
        _FIXED
        + _PER_TENSOR * found["tensors"]
        + _PER_OPERATION * found["operations"]
        + _PER_CHANNEL * found["channels"]
    )
    return found["bytes"] + -(-records // 16) * 16


def _planned(file: str | os.PathLike[str]) -> dict[str, int]:
    path = Path(file)
    if not path.is_file():
        raise ExportError(f"{path}: no such file.")
    found = litert_job("arena", {"file": os.fspath(path)}, what=str(path))
    return {name: int(count) for name, count in found.items()}


def c_array(
    file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    overwrite: bool = False,
) -> Path:
    """Writes a ``.tflite`` file as a C header with one constant array.

    With it the header says, in names that begin with that of the array:

    | name | what |
    | --- | --- |
    | ``<name>``, ``<name>_len`` | the file and its bytes |
    | ``<name>_arena_bytes`` | size of the tensor arena for it |
    | ``<name>_input_count``, ``<name>_output_count`` | how many there are |
    | ``<name>_input_0_type``, ``_rank``, ``_shape``, ``_size`` | of ``interpreter->input(0)`` |
    | ``<name>_input_0_scale``, ``_zero_point`` | of quantized ones only |
    | ``<name>_operator_count`` | of a ``tflite::MicroMutableOpResolver`` that is large enough |
    | ``<name>_add_operators(resolver)`` | in C++: adds the operators to one |

    and likewise for outputs and higher numbers. The include guard is ``<NAME>_H_``: headers in one
    program need different names.

    Args:
        file: the ``.tflite`` file, usually full ``"int8"`` with ``batch_size=1``. A free batch size
            counts as 1.
        path: the header to write.
        name: C identifier of the array.
        overwrite: replace an existing header.

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: if ``name`` is not a C identifier, or a keyword of C or C++.
        ExportError: if the file is missing or damaged, has free sizes besides the batch, or the
            path exists or cannot be written.

    Example:
        >>> import tf_kfacprune as kp
        >>> kp.export.c_array("net.tflite", "net.h", name="net")  # doctest: +SKIP
        PosixPath('net.h')
    """
    check_name(name)
    needed = arena_bytes(file)
    text = header_text(Path(file).read_bytes(), name, needed)
    return write_bytes(path, text.encode(), overwrite=overwrite)
