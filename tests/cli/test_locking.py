"""The lock of an output: held by a process, not by a file."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tf_kfacprune.cli.locking import LockedFolder
from tf_kfacprune.errors import ExportError


def test_second_is_refused_and_told_by_whom(tmp_path):
    first = LockedFolder(tmp_path / "a" / "b.resume", "b is taken")
    with pytest.raises(ExportError, match=f"b is taken: process {os.getpid()} on .* at work"):
        LockedFolder(tmp_path / "a" / "b.resume", "b is taken")
    first.release()
    assert not list(tmp_path.iterdir())
    LockedFolder(tmp_path / "a" / "b.resume", "b is taken").release()


def test_contents_outlive_the_lock(tmp_path):
    lock = LockedFolder(tmp_path / "b.resume", "b")
    (lock.folder / "state").write_text("kept")
    assert lock.contents() == [lock.folder / "state"]
    lock.release()
    lock.release()
    again = LockedFolder(tmp_path / "b.resume", "b")
    assert (again.folder / "state").read_text() == "kept"
    (again.folder / "state").unlink()
    again.release()
    assert not list(tmp_path.iterdir())


def test_lock_of_a_killed_process_is_free(tmp_path):
    code = """
        import os, signal, sys
        from pathlib import Path
        from tf_kfacprune.cli.locking import LockedFolder
        lock = LockedFolder(Path(sys.argv[1]), "")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    # The file alone, of which nothing else of the package needs TensorFlow.
    stubs = "import sys, types; sys.modules['tf_kfacprune'] = p = types.ModuleType('p')\n"
    stubs += f"p.__path__ = {list(__import__('tf_kfacprune').__path__)!r}\n"
    stubs += "sys.modules['tf_kfacprune.cli'] = c = types.ModuleType('c')\n"
    stubs += "c.__path__ = [path + '/cli' for path in p.__path__]\n"
    done = subprocess.run(
        [sys.executable, "-c", stubs + textwrap.dedent(code), tmp_path / "b.resume"], check=False
    )
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "b.resume").iterdir()] == ["lock"]
    LockedFolder(tmp_path / "b.resume", "b").release()


def test_lock_on_a_file_that_is_gone_is_taken_anew(tmp_path, monkeypatch):
    """The other process ends between our opening its file and our locking it."""
    folder = tmp_path / "b.resume"
    other, mkdir = LockedFolder(folder, "b"), type(folder).open

    def slow(path, *args, **kwargs):
        stream = mkdir(path, *args, **kwargs)
        if other.folder.exists():
            other.release()
        return stream

    monkeypatch.setattr(type(folder), "open", slow)
    lock = LockedFolder(folder, "b")
    monkeypatch.undo()
    assert lock.contents() == []
    with pytest.raises(ExportError, match="at work"):
        LockedFolder(folder, "b")
    lock.release()


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"b\.resume cannot be written: Not a directory"):
        LockedFolder(tmp_path / "file" / "b.resume", "b")
