"""Outputs that appear whole or not at all.

Everything is written under a hidden name beside the target, flushed to the disk and renamed at
the end. A crash, an error or a kill leaves the old output, or none: never a part of a new one.

| target | last step | what a kill can leave at the target's name |
| --- | --- | --- |
| file | one rename, which replaces the old file | the old file or the new one |
| folder | one exchange of two names (Linux) | the old folder or the new one |
| folder | two renames, where names cannot be exchanged | also none; the old one is put back later |

A symbolic link is followed: what it points to is written or replaced, the link stays. Only regular
files and folders are ever replaced: a device, a FIFO or a socket is refused.

What a killed process leaves under hidden names is removed by the next export to the same target.
The names say which process of which machine they belong to, so that no running one is disturbed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tf_kfacprune.errors import ExportError

__all__ = [
    "atomic_directory",
    "atomic_file",
    "check_directory",
    "check_file",
    "followed",
    "write_bytes",
]

_SPECIAL = {
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path that becomes the file ``path`` if the block ends without an error.

    Missing folders above the file are made, and removed again if the block fails.

    Args:
        path: the file to write.
        overwrite: replace an existing file.

    Yields:
        A path beside ``path`` with the same suffix, for the block to write.

    Raises:
        ExportError: if ``path`` exists and ``overwrite`` is false, is no regular file, or cannot be
            written.
    """
    target, suffix = followed(path), Path(path).suffix
    _clear_up_after_killed_processes(target, suffix)
    check_file(target, overwrite=overwrite)
    with _beside(target, suffix) as partial:
        yield partial
        _flush(partial)
        _refuse_existing(target, overwrite)
        os.replace(partial, target)
        _flush(target.parent)


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, marker: str, overwrite: bool = False
) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``path`` if the block ends without an error.

    Args:
        path: the folder to write.
        marker: name of a file that such a folder holds. ``overwrite`` replaces only a folder with
            that file, or an empty one, so that a mistyped path cannot delete anything else.
        overwrite: replace an existing folder.

    Yields:
        A new folder beside ``path``, for the block to fill.

    Raises:
        ExportError: as for `atomic_file`, and if the folder to replace is not of this kind.
    """
    target, suffix = followed(path), Path(path).suffix
    _clear_up_after_killed_processes(target, suffix)
    check_directory(target, marker=marker, overwrite=overwrite)
    with _beside(target, suffix) as partial:
        partial.mkdir()
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        _refuse_existing(target, overwrite)
        _swap(partial, target)
        _flush(target.parent)


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuses at once what `atomic_file` would refuse to write.

    Args:
        path: the file that is going to be written.
        overwrite: as for `atomic_file`.

    Raises:
        ExportError: if something is there that may not be replaced.
    """
    target = followed(path)
    _refuse_existing(target, overwrite)
    if target.is_dir():
        raise ExportError(f"{target} is a folder, expected the name of a file.")


def check_directory(path: str | os.PathLike[str], *, marker: str, overwrite: bool = False) -> None:
    """Refuses at once what `atomic_directory` would refuse to write, as it would.

    Args:
        path: the folder that is going to be written.
        marker: as for `atomic_directory`.
        overwrite: as for `atomic_directory`.

    Raises:
        ExportError: if the folder exists and may not be replaced.
    """
    target = followed(path)
    _refuse_existing(target, overwrite)
    if os.path.lexists(target) and not (
        target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))
    ):
        raise ExportError(
            f"{target} exists and is not a folder with {marker}: it will not be replaced, not even "
            "with overwrite. Choose another path, or remove it yourself."
        )


def followed(path: str | os.PathLike[str]) -> Path:
    """Where a path leads: itself, unless its last name is a symbolic link.

    Args:
        path: any path; nothing has to be there.

    Returns:
        The path, or what the link and the links behind it point to, which may be missing.
    """
    target = Path(path)
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def write_bytes(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = False) -> Path:
    """Writes ``content`` to the file ``path``, whole or not at all.

    Raises:
        ExportError: as for `atomic_file`.
    """
    with atomic_file(path, overwrite=overwrite) as partial:
        partial.write_bytes(content)
    return Path(path)


@contextmanager
def _beside(target: Path, suffix: str) -> Iterator[Path]:
    """A hidden temporary name beside ``target``; on any error nothing of it stays.

    The suffix is that of the path that was given: one behind a symbolic link may have another.
    """
    owner = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    partial = target.with_name(f".{target.stem}.{owner}.partial{suffix}")
    made: list[Path] = []
    try:
        for folder in reversed(target.parents):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        yield partial
    except BaseException as error:  # also a keyboard interrupt: whatever happens, nothing stays
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink()
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise ExportError(
                f"{target} cannot be written: {error.strerror or error}. Check that the folder "
                "can be written and the disk is not full."
            ) from error
        raise


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if not target.name:
        raise ExportError(f"{str(target)!r} is not a path that can be written. Name an output.")
    if os.path.lexists(target) and not overwrite:
        raise ExportError(
            f"{target} already exists. Choose another path, or allow it to be replaced with "
            "overwrite."
        )
    if kind := _special_kind(target):
        raise ExportError(
            f"{target} is {kind}, not a regular file: it will not be replaced, not even with "
            "overwrite. Choose another path."
        )


def _special_kind(target: Path) -> str | None:
    """What stands at ``target`` if it may never be replaced; None for files, folders, nothing."""
    try:
        mode = os.lstat(target).st_mode
    except OSError:  # nothing there, or what is in the way is named when the file is made
        return None
    if stat.S_ISLNK(mode):  # only a circle of links is still a link here
        return "a symbolic link that leads in a circle"
    return _SPECIAL.get(stat.S_IFMT(mode))


def _swap(partial: Path, target: Path) -> None:
    """Puts the folder ``partial`` at ``target`` and removes what was there."""
    if not target.exists():
        partial.rename(target)
        return
    if _exchange_names(partial, target):
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = partial.with_name(f"{partial.name}.old")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange_names(first: Path, second: Path) -> bool:
    """Exchanges two names at once; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(current_folder, bytes(first), current_folder, bytes(second), exchange) == 0


def _clear_up_after_killed_processes(target: Path, suffix: str) -> None:
    """Removes temporaries of dead processes, and puts back an old folder that one had moved."""
    if not target.name or not target.parent.is_dir():
        return
    ours = re.compile(
        rf"\.{re.escape(target.stem)}\.{re.escape(_machine())}-(\d+)-\w+\.partial"
        rf"{re.escape(suffix)}(\.old)?"
    )
    for path in sorted(target.parent.iterdir()):
        found = ours.fullmatch(path.name)
        if not found or _is_running(int(found[1])):
            continue
        with suppress(OSError):
            if found[2] and not os.path.lexists(target):
                path.rename(target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return True  # another thread of this one
    if os.name == "nt":
        return True  # a signal would end the process there: leave its files alone
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _machine() -> str:
    """Name of this machine as a part of a file name."""
    return re.sub(r"\W", "_", platform.node()) or "local"


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
