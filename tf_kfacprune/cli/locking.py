"""A lock file that a crash cannot leave locked: the system holds the lock, not the file."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from tf_kfacprune.errors import ExportError

__all__ = ["LockedFolder"]

_NAME = "lock"


class LockedFolder:
    """A folder that belongs to one process until it ends, however it ends.

    The lock (`flock`) is on the file ``lock`` in the folder. The system gives it up with the
    process; the file alone means nothing. A process that waits for nothing and finds the folder
    gone in between makes it anew: a lock on a file that is not there any more would lock nobody
    out.

    Args:
        folder: The folder; it and those above it are made.
        purpose: What the lock is for, for messages.

    Attributes:
        folder: The folder.

    Raises:
        ExportError: If another process holds the lock, or it cannot be had.
    """

    def __init__(self, folder: Path, purpose: str) -> None:
        self.folder = folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._stream: IO[str] | None = None
        try:
            while self._stream is None:
                self._stream = self._try(purpose)
        except OSError as error:
            self._remove_made()
            raise ExportError(
                f"{folder} cannot be written: {error.strerror or error}. Check that the folder can "
                "be written, and that its file system has locks."
            ) from error

    def _try(self, purpose: str) -> IO[str] | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _NAME
        try:
            stream = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # another process has just removed the folder
            return None
        if not _lock(stream):
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            stream.close()
            raise ExportError(f"{purpose}: {owner} is at work there. Wait for it, or stop it.")
        try:
            is_there = os.path.samestat(os.stat(path), os.fstat(stream.fileno()))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            stream.close()
            return None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}")
        stream.flush()
        return stream

    def contents(self) -> list[Path]:
        """What is in the folder beside the lock."""
        return sorted(path for path in self.folder.iterdir() if path.name != _NAME)

    def release(self) -> None:
        """Gives the lock up; the folder is removed if there is nothing else in it."""
        if self._stream is None:
            return
        if not self.contents():
            # While it is locked, so that nobody can have begun to use it. (Windows keeps it.)
            with suppress(OSError):
                (self.folder / _NAME).unlink()
            self._remove_made(self.folder)
        self._stream.close()
        self._stream = None

    def _remove_made(self, *more: Path) -> None:
        for path in dict.fromkeys([*more, *self._made]):
            with suppress(OSError):  # somebody else uses it by now, or it was never made
                path.rmdir()


def _lock(stream: IO[str]) -> bool:
    """Locks an open file, without waiting; False if somebody else has."""
    try:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
