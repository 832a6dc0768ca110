"""Reads FlatBuffers: tables whose fields are offsets to what they contain.

All positions are bytes from the start of the content; 0 stands for what is absent.

References:
    FlatBuffers internals, https://flatbuffers.dev/internals.
"""

from __future__ import annotations

import struct

__all__ = ["byte_string", "fields", "integers", "numbers", "tables", "target", "u32"]


def fields(content: bytes, table: int, count: int = 0) -> list[int]:
    """Positions of the fields of a table; 0 for absent ones.

    Args:
        content: the whole FlatBuffer.
        table: position of the table.
        count: list so many fields; by default as many as the table describes, which leaves out
            absent ones at its end.
    """
    description = table - struct.unpack_from("<i", content, table)[0]
    (size,) = struct.unpack_from("<H", content, description)
    offsets = struct.unpack_from(f"<{size // 2 - 2}H", content, description + 4)
    found = [table + offset if offset else 0 for offset in offsets]
    return [*found, *[0] * (count - len(found))][: count or len(found)]


def tables(content: bytes, field: int) -> list[int]:
    """Positions of the tables that a vector field lists."""
    if not field:
        return []
    start = target(content, field)
    count = u32(content, start)
    return [target(content, start + 4 + 4 * i) for i in range(count)]


def numbers(content: bytes, field: int, kind: str) -> tuple[float, ...]:
    """The numbers that a vector field lists; `kind` is their format for `struct`."""
    if not field:
        return ()
    start = target(content, field)
    return struct.unpack_from(f"<{u32(content, start)}{kind}", content, start + 4)


def integers(content: bytes, field: int, kind: str = "i") -> tuple[int, ...]:
    """The whole numbers that a vector field lists, of 4 bytes by default."""
    return tuple(int(number) for number in numbers(content, field, kind))


def target(content: bytes, position: int) -> int:
    """Where the offset at a position points; 0 stays 0, for an absent field."""
    return position + u32(content, position) if position else 0


def byte_string(content: bytes, start: int) -> bytes:
    """The bytes of a vector or string that starts at a position."""
    return content[start + 4 : start + 4 + u32(content, start)] if start else b""


def u32(content: bytes, position: int) -> int:
    """The unsigned number of 4 bytes at a position."""
    return int(struct.unpack_from("<I", content, position)[0])
