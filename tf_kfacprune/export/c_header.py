"""The text of a C header with a .tflite file in it, and what a program must know to run it."""

from __future__ import annotations

import re
import warnings
from math import prod
from types import MappingProxyType

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.arena import Arena
from tf_kfacprune.export.file_interface import FileTensor, read_interface
from tf_kfacprune.export.operators import micro_method

__all__ = ["check_name", "header_text"]

_BYTES_PER_LINE = 12
_C_TYPES = MappingProxyType(
    {
        "float32": "float",
        "float64": "double",
        "float16": "uint16_t",  # its bits: C has no such type
        "bool": "uint8_t",
        **{f"{u}int{bits}": f"{u}int{bits}_t" for u in ("", "u") for bits in (8, 16, 32, 64)},
    }
)
# Of C17 and C++20.
_KEYWORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
    char32_t class co_await co_return co_yield compl concept const const_cast consteval constexpr
    constinit continue decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
    nullptr operator or or_eq private protected public register reinterpret_cast requires restrict
    return short signed sizeof static static_assert static_cast struct switch template this
    thread_local throw true try typedef typeid typename union unsigned using virtual void volatile
    wchar_t while xor xor_eq
"""


def check_name(name: str) -> None:
    """Refuses a name that C or C++ does not take.

    Raises:
        InvalidArgumentError: if it is no identifier, or a keyword.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in _KEYWORDS.split():
        raise InvalidArgumentError(
            f"name must be a C identifier, and no keyword of C or C++. Received: name={name!r}."
        )


def header_text(content: bytes, name: str, arena: Arena) -> str:
    """A header for C and C++.

    Args:
        content: the ``.tflite`` file.
        name: C identifier of the array; all other names begin with it.
        arena: the tensor arena for it.

    Returns:
        The text. Operators that TensorFlow Lite Micro does not have are named in it and in a
        warning.

    Raises:
        ExportError: if an input or output has a free size besides the batch, or a type that C has
            not.
    """
    file = read_interface(content)
    guard = f"{name.upper()}_H_"
    source = "measured with" if arena.is_measured else "an estimate, without"
    sides = (("input", file.inputs), ("output", file.outputs))
    rows = [
        ", ".join(f"0x{byte:02x}" for byte in content[i : i + _BYTES_PER_LINE])
        for i in range(0, len(content), _BYTES_PER_LINE)
    ]
    return "\n".join(
        [
            f"/* TensorFlow Lite model, {len(content)} bytes. */",
            f"#ifndef {guard}",
            f"#define {guard}",
            "",
            "#include <stdint.h>",
            "",
            f"/* Size of the tensor arena, {source} TensorFlow Lite Micro (reference kernels). */",
            f"enum {{ {name}_arena_bytes = {arena.bytes} }};",
            f"enum {{ {name}_len = {len(content)} }};",
            "",
            *(f"enum {{ {name}_{side}_count = {len(tensors)} }};" for side, tensors in sides),
            *(
                line
                for side, tensors in sides
                for index, tensor in enumerate(tensors)
                for line in _described(tensor, side, index, name)
            ),
            *_operators(file.operators, name),
            f"static const unsigned char {name}[] __attribute__((aligned(16))) = {{",
            *(f"  {row}," for row in rows),
            "};",
            "",
            f"#endif  /* {guard} */",
            "",
        ]
    )


def _described(tensor: FileTensor, side: str, index: int, name: str) -> list[str]:
    """Type, shape and scaling of `interpreter->input(index)` or `output(index)`."""
    if set(tensor.free) - {0}:
        raise ExportError(
            f"{side.capitalize()} {tensor.name!r} has a free size besides the batch, which "
            "TensorFlow Lite Micro takes for 1. Build the model for inputs of fixed shape."
        )
    if tensor.dtype not in _C_TYPES:
        raise ExportError(
            f"{side.capitalize()} {tensor.name!r} has dtype {tensor.dtype}, for which C has no "
            f"type. Expected one of {', '.join(sorted(_C_TYPES))}."
        )
    prefix, rank = f"{name}_{side}_{index}", len(tensor.shape)
    sizes = ", ".join(map(str, tensor.shape))
    shown = re.sub(r"[^\w.:;-]", "_", tensor.name)  # nothing that could end the comment
    lines = ["", f'/* {side.capitalize()} {index}, "{shown}": {tensor.dtype} [{sizes}]. */']
    if tensor.scale is not None:
        lines[-1] = lines[-1].replace(". */", ", real = scale * (value - zero_point). */")
    lines += [
        f"typedef {_C_TYPES[tensor.dtype]} {prefix}_type;",
        f"enum {{ {prefix}_size = {prod(tensor.shape)} }};  /* elements */",
        f"enum {{ {prefix}_rank = {rank} }};",
    ]
    if rank:
        lines.append(f"static const int {prefix}_shape[{rank}] = {{{sizes}}};")
    if tensor.scale is not None:
        lines += [
            f"static const float {prefix}_scale = {tensor.scale:.9e}f;",
            f"enum {{ {prefix}_zero_point = {tensor.zero_point} }};",
        ]
    return lines


def _operators(operators: tuple[str, ...], name: str) -> list[str]:
    """What the program has to add to its `tflite::MicroMutableOpResolver`."""
    listed = re.sub(r"[^\w, ]", "_", ", ".join(operators))
    lines = ["", f"/* Operators: {listed}. */"]
    lines += [f"enum {{ {name}_operator_count = {len(operators)} }};"]
    methods = [micro_method(operator) for operator in operators]
    missing = [op for op, method in zip(operators, methods, strict=True) if method is None]
    if missing:
        warnings.warn(
            f"TensorFlow Lite Micro has no {', '.join(missing)}: the header has no function "
            f"{name}_add_operators, and is for other runtimes.",
            stacklevel=4,
        )
        named = re.sub(r"[^\w, ]", "_", ", ".join(missing))
        return [*lines, f"/* TensorFlow Lite Micro has no {named}. */", ""]
    calls = " &&\n         ".join(f"resolver.{method}() == 0" for method in methods) or "true"
    return [
        *lines,
        "",
        "#ifdef __cplusplus",
        f"/* Adds them to a tflite::MicroMutableOpResolver<{name}_operator_count>.",
        "   Returns whether there was room for all. */",
        "template <typename Resolver>",
        f"bool {name}_add_operators(Resolver& resolver) {{",
        f"  return {calls};",
        "}",
        "#endif",
        "",
    ]
