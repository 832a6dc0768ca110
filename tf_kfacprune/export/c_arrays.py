"""A .tflite file as a C array, for microcontrollers without a file system."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.export.arena import runnable_arena
from tf_kfacprune.export.atomic import write_bytes

__all__ = ["c_array"]

_BYTES_PER_LINE = 12


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
        name: C identifier of the array; its length is ``<name>_len`` and the size of the tensor
            arena for it ``<name>_arena_bytes``.
        overwrite: replace an existing header.

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: if ``name`` is not a C identifier.
        ExportError: if the file is missing or damaged or TensorFlow Lite Micro cannot run it, or
            the path exists or cannot be written.

    Example:
        >>> import tf_kfacprune as kp
        >>> kp.export.c_array("net.tflite", "net.h", name="net")  # doctest: +SKIP
        PosixPath('net.h')
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise InvalidArgumentError(f"name must be a C identifier. Received: name={name!r}.")
    arena = runnable_arena(file)
    source = "measured with" if arena.is_measured else "an estimate, without"
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
            f"/* Size of the tensor arena, {source} TensorFlow Lite Micro (reference kernels). */",
            f"enum {{ {name}_arena_bytes = {arena.bytes} }};",
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
