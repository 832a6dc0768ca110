"""Outputs appear whole or not at all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export import atomic
from tf_kfacprune.export.atomic import atomic_directory, atomic_file, check_directory, write_bytes


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


KILLED_EVERYWHERE = """
    import json, os, signal, sys
    from pathlib import Path
    from tf_kfacprune.export import atomic

    def export(exchange):
        if not exchange:
            atomic._exchange_names = lambda first, second: False
        with atomic.atomic_directory("folder", marker="m", overwrite=True) as folder:
            (folder / "m").write_text("new")
            (folder / "deep").mkdir()
            (folder / "deep" / "f").write_text("new")
        with atomic.atomic_file("file", overwrite=True) as file:
            file.write_text("new")

    def in_child(work):
        child = os.fork()
        if not child:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1]

    def killed_at(step, exchange):
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            seen += event != "os.kill"
            if seen > step and event != "os.kill":
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        export(exchange)

    def content(path):
        return path.read_text() if path.exists() else None

    found = []
    for exchange in (True, False):
        step = 0
        status = None
        while status != 0:
            work = Path(sys.argv[1], f"{exchange}-{step}")
            (work / "folder" / "deep").mkdir(parents=True)
            for name in ("folder/m", "folder/deep/f", "file"):
                (work / name).write_text("old")
            os.chdir(work)
            status = in_child(lambda: killed_at(step, exchange))
            after = [content(work / name) for name in ("folder/m", "folder/deep/f", "file")]
            in_child(lambda: export(True))
            left = sorted(os.listdir(work))
            again = [content(work / name) for name in ("folder/m", "folder/deep/f", "file")]
            found.append((exchange, status, after, left, again))
            step += 1
    print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_process_killed_at_any_step_leaves_whole_outputs_and_the_next_one_clears_up(tmp_path):
    """Every open, rename, mkdir... of two exports is once the last thing that a process does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_EVERYWHERE), tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    exchanging = [after for exchange, _, after, _, _ in found if exchange]
    renaming = [after for exchange, _, after, _, _ in found if not exchange]
    assert sum(status == 9 for _, status, *_ in found) >= 30
    assert {tuple(after[:2]) for after in exchanging} == {("old", "old"), ("new", "new")}
    assert {tuple(after[:2]) for after in renaming} == {
        ("old", "old"),
        (None, None),
        ("new", "new"),
    }
    assert {after[2] for after in exchanging + renaming} == {"old", "new"}
    for _, _, _, left, again in found:
        assert left == ["file", "folder"]
        assert again == ["new", "new", "new"]


def test_temporaries_of_running_processes_and_other_machines_are_left_alone(tmp_path):
    machine = atomic._machine()
    running = tmp_path / f".a.{machine}-{os.getppid()}-00ff.partial.bin"
    elsewhere = tmp_path / f".a.other_{machine}-1-00ff.partial.bin"
    alike = tmp_path / ".a.partial.bin"
    for path in (running, elsewhere, alike):
        path.write_text("theirs")
    write_bytes(tmp_path / "a.bin", b"ours")
    assert all(path.exists() for path in (running, elsewhere, alike))


def test_folder_that_a_killed_process_had_moved_is_put_back(tmp_path):
    # The largest process number that Linux hands out, plus one: surely dead.
    old = tmp_path / f".saved.{atomic._machine()}-{2**22 + 1}-00ff.partial.old"
    old.mkdir()
    (old / "m").write_text("old")
    with (
        pytest.raises(ExportError, match="already exists"),
        atomic_directory(tmp_path / "saved", marker="m"),
    ):
        pytest.fail("the block ran")
    assert (tmp_path / "saved" / "m").read_text() == "old"
    assert os.listdir(tmp_path) == ["saved"]


def special_files(folder):
    """A FIFO, a socket and a character device, by name."""
    os.mkfifo(folder / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    listening.close()
    return {"fifo": folder / "fifo", "socket": folder / "socket", "device": Path(os.devnull)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize(
    ("kind", "said"),
    [("fifo", "a FIFO"), ("socket", "a socket"), ("device", "a character device")],
)
@pytest.mark.parametrize("linked", [False, True])
def test_special_file_is_never_replaced(tmp_path, monkeypatch, kind, said, linked):
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    target = special_files(Path())[kind]
    before = os.lstat(target)
    if linked:
        Path("link").symlink_to(target)
    for write in (
        lambda path: write_bytes(path, b"new", overwrite=True),
        lambda path: atomic_directory(path, marker="m", overwrite=True).__enter__(),
    ):
        with pytest.raises(ExportError, match=f"is {said}.*not even with overwrite"):
            write(Path("link") if linked else target)
    assert os.path.samestat(os.lstat(target), before)


def test_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    old = write_bytes(tmp_path / "real" / "blob", b"old")
    (tmp_path / "link.bin").symlink_to(old)
    with pytest.raises(ExportError, match="blob already exists"):
        write_bytes(tmp_path / "link.bin", b"new")
    with atomic_file(tmp_path / "link.bin", overwrite=True) as partial:
        assert partial.suffix == ".bin"  # formats are told by it
        partial.write_bytes(b"new")
    assert (tmp_path / "link.bin").is_symlink()
    assert old.read_bytes() == b"new"
    assert os.listdir(tmp_path / "real") == ["blob"]


def test_link_to_a_folder_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "m").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check_directory(tmp_path / "link", marker="m", overwrite=True)
    with atomic_directory(tmp_path / "link", marker="m", overwrite=True) as partial:
        (partial / "m").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "m").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_links_to_nothing_are_written_through_and_circles_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "later" / "file")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "later" / "file").read_bytes() == b"new"
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ExportError, match="leads in a circle"):
        write_bytes(tmp_path / "a", b"new", overwrite=True)
