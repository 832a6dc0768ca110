"""Reading FlatBuffers without a library: positions of tables, fields and vectors in the content.

References:
    FlatBuffers internals, https://flatbuffers.dev/internals.
"""

from __future__ import annotations

import struct

__all__ = ["byte_vector", "int_vector", "table_fields", "table_list", "target_of", "u32"]


def table_fields(content: bytes, table: int) -> list[int]:
    """Positions of the fields of a table; 0 for absent ones."""
    description = table - struct.unpack_from("<i", content, table)[0]
    (size,) = struct.unpack_from("<H", content, description)
    offsets = struct.unpack_from(f"<{size // 2 - 2}H", content, description + 4)
    return [table + offset if offset else 0 for offset in offsets]


def table_list(content: bytes, field: int) -> list[int]:
    """Positions of the tables that a vector field lists."""
    if not field:
        return []
    start = target_of(content, field)
    count = u32(content, start)
    return [target_of(content, start + 4 + 4 * i) for i in range(count)]


def target_of(content: bytes, position: int) -> int:
    """Where the offset at a position points; 0 stays 0, for an absent field."""
    return position + u32(content, position) if position else 0


def byte_vector(content: bytes, start: int) -> bytes:
    """The bytes of a vector of bytes that starts here; none for an absent one."""
    return content[start + 4 : start + 4 + u32(content, start)] if start else b""


def int_vector(content: bytes, field: int) -> list[int]:
    """The numbers of a vector of 32-bit integers, none for an absent one."""
    if not field:
        return []
    start = target_of(content, field)
    return list(struct.unpack_from(f"<{u32(content, start)}i", content, start + 4))


def u32(content: bytes, position: int) -> int:
    """The unsigned 32-bit integer at a position."""
    return int(struct.unpack_from("<I", content, position)[0])
