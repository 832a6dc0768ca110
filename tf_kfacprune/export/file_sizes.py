"""Size of an exported file, as it is and compressed."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

from tf_kfacprune.errors import ExportError

__all__ = ["FileSize", "file_size"]


@dataclass(frozen=True)
class FileSize:
    """Size of a file.

    Attributes:
        raw: bytes on the disk.
        gzip: bytes after gzip at its highest level, as an app store or a firmware image ships it.
    """

    raw: int
    gzip: int

    @classmethod
    def of(cls, content: bytes) -> FileSize:
        """Size of a file with this content."""
        return cls(len(content), len(gzip.compress(content, compresslevel=9, mtime=0)))


def file_size(path: str | os.PathLike[str]) -> FileSize:
    """Size of a file, as it is and compressed.

    Args:
        path: the file.

    Returns:
        Its bytes, raw and after gzip.

    Raises:
        ExportError: if there is no such file.
    """
    if not Path(path).is_file():
        raise ExportError(f"{os.fspath(path)}: no such file.")
    return FileSize.of(Path(path).read_bytes())
