"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.atomic import atomic_directory, atomic_file, write_bytes


def fail_after(write, content, error):
    write(content)
    raise error


def test_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "a.bin"
    with atomic_file(target) as partial:
        partial.write_bytes(b"new")
        assert partial.suffix == ".bin"
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    target = write_bytes(tmp_path / "a.bin", b"old")
    with pytest.raises(error), atomic_file(target, overwrite=True) as partial:
        fail_after(partial.write_bytes, b"half", error)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_existing_file_is_refused_before_anything_is_written(tmp_path):
    target = write_bytes(tmp_path / "a.bin", b"old")
    with pytest.raises(ExportError, match=r"a\.bin already exists.*overwrite"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    write_bytes(target, b"new", overwrite=True)
    assert target.read_bytes() == b"new"


def test_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "a.bin"
    with pytest.raises(ExportError, match="already exists"), atomic_file(target) as partial:
        _ = partial.write_bytes(b"ours"), target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_folder_in_place_of_a_file_is_refused_even_with_overwrite(tmp_path):
    with pytest.raises(ExportError, match="is a folder"):
        write_bytes(tmp_path, b"", overwrite=True)


def test_missing_folders_are_made_and_removed_again_on_failure(tmp_path):
    target = tmp_path / "x" / "y" / "a.bin"
    with pytest.raises(ValueError), atomic_file(target):
        raise ValueError
    assert not (tmp_path / "x").exists()
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"


def test_unwritable_place_is_named(tmp_path):
    blocking = write_bytes(tmp_path / "file", b"")
    with pytest.raises(ExportError, match=r"file/a\.bin cannot be written"):
        write_bytes(blocking / "a.bin", b"new")


def test_directory_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "saved"
    with atomic_directory(target, marker="m") as partial:
        (partial / "m").write_text("1")
        (partial / "inner").mkdir()
        (partial / "inner" / "f").write_text("2")
        assert not target.exists()
    assert (target / "inner" / "f").read_text() == "2"
    assert os.listdir(tmp_path) == ["saved"]


def test_failed_directory_keeps_the_old_one(tmp_path):
    target = tmp_path / "saved"
    with atomic_directory(target, marker="m") as partial:
        (partial / "m").write_text("old")
    with (
        pytest.raises(RuntimeError),
        atomic_directory(target, marker="m", overwrite=True) as partial,
    ):
        fail_after((partial / "m").write_text, "half", RuntimeError)
    assert (target / "m").read_text() == "old"
    assert os.listdir(tmp_path) == ["saved"]


def test_overwrite_replaces_the_whole_directory(tmp_path):
    target = tmp_path / "saved"
    for name in ["first", "second"]:
        with atomic_directory(target, marker="m", overwrite=True) as partial:
            (partial / "m").write_text(name)
            (partial / name).write_text("")
    assert sorted(os.listdir(target)) == ["m", "second"]
    assert os.listdir(tmp_path) == ["saved"]


def test_overwrite_never_deletes_a_folder_of_another_kind(tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letters").write_text("dear")
    with (
        pytest.raises(ExportError, match=r"not a folder with saved_model\.pb"),
        atomic_directory(precious, marker="saved_model.pb", overwrite=True),
    ):
        pytest.fail("the block ran")
    assert (precious / "letters").read_text() == "dear"


def test_killed_process_leaves_the_old_outputs(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m").write_text("old")
    program = f"""
        import os, signal
        os.chdir({str(tmp_path)!r})
        from tf_kfacprune.export.atomic import atomic_directory, atomic_file
        with atomic_file("file", overwrite=True) as file:
            file.write_text("half")
            with atomic_directory("folder", marker="m", overwrite=True) as folder:
                (folder / "m").write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    code = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -9
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "m").read_text() == "old"
