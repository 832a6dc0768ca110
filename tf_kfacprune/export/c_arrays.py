"""A .tflite file as a C array, for microcontrollers without a file system."""

from __future__ import annotations

import os
from pathlib import Path

from tf_kfacprune.export.arena import arena_of, estimated_arena
from tf_kfacprune.export.atomic import write_bytes
from tf_kfacprune.export.c_header import check_name, header_text

__all__ = ["c_array"]


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
        ExportError: if the file is missing or damaged, has free sizes besides the batch, or cannot
            be run by TensorFlow Lite Micro for another reason than an operator that it lacks; or
            the path exists or cannot be written.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.export.c_array("net.tflite", "net.h", name="net")  # doctest: +SKIP
        PosixPath('net.h')
    """
    check_name(name)
    arena = arena_of(file)
    content = Path(file).read_bytes()
    if arena.lacking:  # for another runtime, about which nothing was measured
        arena = estimated_arena(content)
    text = header_text(content, name, arena)
    return write_bytes(path, text.encode(), overwrite=overwrite)
