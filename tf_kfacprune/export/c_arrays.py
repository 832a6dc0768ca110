"""A .tflite file as a C array, for microcontrollers without a file system.

The interpreter there works in a block of memory of fixed size, the tensor arena, which must hold
all activations that live at the same time. Their least size follows from the order of operations:
tensors are placed from the largest to the smallest at the lowest offset where no tensor alive at
the same time is, which is how TensorFlow Lite Micro plans its arena.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.atomic import write_bytes
from tf_kfacprune.export.running import litert_job

__all__ = ["activation_bytes", "c_array"]

_BYTES_PER_LINE = 12


def activation_bytes(file: str | os.PathLike[str]) -> int:
    """Bytes that the activations of one inference need, a lower bound of the tensor arena.

    TensorFlow Lite Micro adds records of its own and scratch buffers of some kernels, usually a
    few kilobytes.

    Args:
        file: a ``.tflite`` file; a free batch size counts as 1.

    Returns:
        Bytes, each tensor rounded up to 16.

    Raises:
        ExportError: if the file is missing or LiteRT cannot load it.
    """
    path = Path(file)
    if not path.is_file():
        raise ExportError(f"{path}: no such file.")
    return int(litert_job("arena", {"file": os.fspath(path)}, what=str(path))["bytes"])


def c_array(
    file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    overwrite: bool = False,
) -> Path:
    """Writes a ``.tflite`` file as a C header with one constant array.

    Args:
        file: the ``.tflite`` file, usually full ``"int8"`` with ``batch_size=1``.
        path: the header to write.
        name: C identifier of the array; its length is ``<name>_len`` and the least size of the
            tensor arena ``<name>_activation_bytes``.
        overwrite: replace an existing header.

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: if ``name`` is not a C identifier.
        ExportError: if the file is missing or damaged, or the path exists or cannot be written.

    Example:
        >>> import tf_kfacprune as kp
        >>> kp.export.c_array("net.tflite", "net.h", name="net")  # doctest: +SKIP
        PosixPath('net.h')
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise InvalidArgumentError(f"name must be a C identifier. Received: name={name!r}.")
    needed = activation_bytes(file)
    content = Path(file).read_bytes()
    guard = f"{name.upper()}_H_"
    lines = [
        ", ".join(f"0x{byte:02x}" for byte in content[i : i + _BYTES_PER_LINE])
        for i in range(0, len(content), _BYTES_PER_LINE)
    ]
    text = "\n".join(
        [
            f"/* TensorFlow Lite model, {len(content)} bytes. */",
            f"#ifndef {guard}",
            f"#define {guard}",
            "",
            "/* The tensor arena needs this for activations, plus a few kilobytes of its own. */",
            f"enum {{ {name}_activation_bytes = {needed} }};",
            f"enum {{ {name}_len = {len(content)} }};",
            "",
            f"static const unsigned char {name}[] __attribute__((aligned(16))) = {{",
            *(f"  {line}," for line in lines),
            "};",
            "",
            f"#endif  /* {guard} */",
            "",
        ]
    )
    return write_bytes(path, text.encode(), overwrite=overwrite)
