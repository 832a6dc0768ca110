"""Named entries inside a .tflite file, added and read without a FlatBuffers library.

A ``.tflite`` file is a FlatBuffer: tables that point forward to what they contain. A new root table
is put *before* the old content and points into it, so that weights keep their place and their
alignment of 16 bytes, and whatever this file does not know about stays as it is.

    new:  header | root table | entry list | buffer list | new entry | new buffer | old content

References:
    FlatBuffers internals, https://flatbuffers.dev/internals; table ``Model`` of the TFLite schema,
    tensorflow/compiler/mlir/lite/schema/schema.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.flatbuffer import byte_string, fields, tables, target, u32

__all__ = ["add_entry", "read_entries", "root_fields"]

_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16

# Fields of table Model, in the order of the schema; all but the first are offsets.
_FIELDS = (
    "version",
    "operator_codes",
    "subgraphs",
    "description",
    "buffers",
    "metadata_buffer",
    "metadata",
    "signature_defs",
)


def read_entries(content: bytes) -> dict[str, bytes]:
    """The named entries of a ``.tflite`` file.

    Args:
        content: the whole file.

    Returns:
        Name -> content of every entry, those of the converter too.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file.
    """
    try:
        root = root_fields(content)
        buffers = tables(content, root["buffers"])
        entries = {}
        for table in tables(content, root["metadata"]):
            entry = fields(content, table)
            name = byte_string(content, target(content, entry[0])).decode()
            index = u32(content, entry[1]) if len(entry) > 1 and entry[1] else 0
            buffer = fields(content, buffers[index])
            data = target(content, buffer[0]) if buffer else 0
            entries[name] = byte_string(content, data)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ExportError(f"The content of the .tflite file is damaged: {error}.") from error
    return entries


def add_entry(content: bytes, name: str, value: bytes) -> bytes:
    """A ``.tflite`` file with one more named entry.

    Args:
        content: the whole file.
        name: name of the entry, which must be new.
        value: its content.

    Returns:
        The content of the new file.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, has fields that this package
            does not know, or has such an entry already.
    """
    if name in read_entries(content):
        raise ExportError(f"The .tflite file has an entry {name!r} already.")
    root = root_fields(content)
    entries = tables(content, root["metadata"])
    buffers = tables(content, root["buffers"])

    head = _Head()
    version = u32(content, root["version"]) if root["version"] else 0
    present = {"version", "buffers", "metadata", *(name for name in _FIELDS if root[name])}
    slots = head.table([version] + [0] * (len(_FIELDS) - 1), [name in present for name in _FIELDS])
    head.words[0] = head.last_table
    entry_slots = head.vector(len(entries) + 1)
    name_slot, _ = head.table([0, len(buffers)])
    head.point(entry_slots[-1], head.last_table)
    head.point(name_slot, head.text(name.encode() + b"\0", len(name.encode())))
    buffer_slots = head.vector(len(buffers) + 1)
    (data_slot,) = head.table([0])
    head.point(buffer_slots[-1], head.last_table)
    head.align(_ALIGNMENT, before=4)
    head.point(data_slot, head.text(value, len(value)))
    head.align(_ALIGNMENT)

    shift = 4 * len(head.words)
    for slot, field in zip(slots[1:], _FIELDS[1:], strict=True):
        if root[field]:
            head.point(slot, target(content, root[field]) + shift)
    head.point(slots[_FIELDS.index("metadata")], entry_slots[0] * 4 - 4)
    head.point(slots[_FIELDS.index("buffers")], buffer_slots[0] * 4 - 4)
    for slot, table in zip(entry_slots, entries, strict=False):
        head.point(slot, table + shift)
    for slot, table in zip(buffer_slots, buffers, strict=False):
        head.point(slot, table + shift)
    return struct.pack(f"<{len(head.words)}I", *head.words) + content


class _Head:
    """The words (4 bytes each) that are put before the old content; slots are word numbers."""

    def __init__(self) -> None:
        self.words = [0, struct.unpack("<I", _IDENTIFIER)[0]]
        self.last_table = 0  # in bytes

    def table(self, values: Sequence[int], present: Sequence[bool] = ()) -> list[int]:
        """A table whose fields are all words; returns their slots.

        A field that is not ``present`` has a slot that nobody looks at: an offset of 0 is invalid.
        """
        size = 4 + 4 * len(values)
        places = [4 * (i + 1) for i in range(len(values))]
        if present:
            places = [place * there for place, there in zip(places, present, strict=True)]
        description = [4 + 2 * len(values), size, *places]
        description += [0] * (len(description) % 2)
        start = len(self.words)
        packed = struct.pack(f"<{len(description)}H", *description)
        self.words += struct.unpack(f"<{len(description) // 2}I", packed)
        self.last_table = 4 * len(self.words)
        self.words += [self.last_table - 4 * start, *values]
        return list(range(len(self.words) - len(values), len(self.words)))

    def vector(self, count: int) -> list[int]:
        """A vector of offsets; returns their slots."""
        self.words += [count] + [0] * count
        return list(range(len(self.words) - count, len(self.words)))

    def text(self, content: bytes, length: int) -> int:
        """A vector of bytes, padded to whole words; returns where it starts."""
        start = 4 * len(self.words)
        padded = content + b"\0" * (-len(content) % 4)
        self.words += [length, *struct.unpack(f"<{len(padded) // 4}I", padded)]
        return start

    def align(self, bytes_: int, before: int = 0) -> None:
        """Fills up until what follows after ``before`` bytes is aligned."""
        while (4 * len(self.words) + before) % bytes_:
            self.words.append(0)

    def point(self, slot: int, target: int) -> None:
        """Lets an offset point to a place, given in bytes of the new file."""
        self.words[slot] = target - 4 * slot


def root_fields(content: bytes) -> dict[str, int]:
    """Positions of the fields of the root table, by name; 0 for absent ones.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or of a newer schema.
    """
    if len(content) < 8 or content[4:8] != _IDENTIFIER:
        raise ExportError("The content is not that of a .tflite file: its identifier is missing.")
    found = fields(content, u32(content, 0))
    if any(found[len(_FIELDS) :]):
        raise ExportError(
            "The .tflite file is of a newer schema than this package knows: nothing can be added "
            "to it or read from it."
        )
    found = found[: len(_FIELDS)]
    return dict(zip(_FIELDS, [*found, *[0] * (len(_FIELDS) - len(found))], strict=True))
