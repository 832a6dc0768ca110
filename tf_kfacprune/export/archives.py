"""Archives that unpack to far more than they hold are refused before anything in them is read.

Keras stores the members of a ``.keras`` file as they are, so that the file is as large as what is
in it; others may have packed it again. Keras itself refuses members of more than 4 GiB only. The
sizes come from the directory of the archive: Python reads no more of a member than is declared
there.

| symbol | meaning |
| --- | --- |
| n_i | bytes that member i unpacks to |
| p_i | bytes that it takes up in the archive |
| E | 32, what packing may save |

Bytes that packing does not explain, sum_i max(0, n_i - E p_i), may be 64 MiB in all. A text file
(``.json``) is read as a whole and may have 64 MiB, packed or not.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["refuse_bomb"]

_MAX_EXPANSION = 32
_ALLOWED_BYTES = 64 * 2**20


def refuse_bomb(path: Path) -> None:
    """Refuses an archive whose members unpack to far more than the archive holds.

    Args:
        path: a zip archive.

    Raises:
        InvalidArgumentError: with the member and its sizes, or if the directory of the archive
            cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{path}: the directory of this archive cannot be read: {error}. Save or copy the file "
            "again."
        ) from error
    unexplained = [
        max(0, member.file_size - _MAX_EXPANSION * member.compress_size) for member in members
    ]
    for member, excess in zip(members, unexplained, strict=True):
        is_long_text = member.filename.endswith(".json") and member.file_size > _ALLOWED_BYTES
        if is_long_text or excess > _ALLOWED_BYTES:
            raise InvalidArgumentError(
                f"{path}: member {member.filename!r} unpacks to {member.file_size:,} bytes and "
                f"takes up {member.compress_size:,} in the file. No model needs that: nothing of "
                "it was read. Save the model again with model.save(path)."
            )
    packed = sum(member.compress_size for member in members)
    if sum(unexplained) > _ALLOWED_BYTES or packed > path.stat().st_size:
        raise InvalidArgumentError(
            f"{path}: its {len(members)} members unpack to "
            f"{sum(member.file_size for member in members):,} bytes, and the file has "
            f"{path.stat().st_size:,}. No model needs that: nothing of it was read. Save the model "
            "again with model.save(path)."
        )
