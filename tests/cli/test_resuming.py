"""A run that is interrupted: what is kept, how it goes on, and who may not begin in between."""

from __future__ import annotations

import json
import shutil
import signal

import keras
import numpy as np
import pytest

from tf_kfacprune.cli import train
from tf_kfacprune.cli.backup import Backup, progress
from tf_kfacprune.cli.kept_run import KeptRun
from tf_kfacprune.cli.locking import LockedFolder
from tf_kfacprune.cli.main import main
from tf_kfacprune.errors import ExportError, KFACPruneError
from tf_kfacprune.training import PrunableModel


@pytest.fixture(scope="module")
def flags(small):
    """A run of three epochs of eight steps, with noise in it."""
    net = keras.models.load_model(small / "out2.keras")
    hidden = keras.layers.Dropout(0.3, name="drop")(net.get_layer("fc1").output)
    last = keras.layers.Dense(2, name="last", kernel_initializer=keras.initializers.Zeros())
    keras.Model(net.input, last(hidden), name="noisy").save(small / "noisy.keras")
    return [
        f"--model={small / 'noisy.keras'}",
        f"--data={small / 'bars.npz'}",
        "--learning_rate=0.01",
        "--epochs=3",
        "--batch_size=8",
        "--seed=3",
    ]


def run(*arguments):
    return main(["train", *map(str, arguments)])


def weights(file):
    model = keras.models.load_model(file)
    of_optimizer = model.optimizer.variables if getattr(model, "optimizer", None) else ()
    return [keras.ops.convert_to_numpy(v) for v in [*model.variables, *of_optimizer]]


def parsed(*arguments):
    command = train.command()
    command.parse([str(argument) for argument in arguments])
    return command.flags


@pytest.mark.slow
@pytest.mark.timeout(900)  # five calls of the program, three of which trace a step
@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer=adam"],
        # Tracing gates takes most of a minute.
        pytest.param(["--optimizer=kfac", "--budget_macs=0.5"], marks=pytest.mark.slow),
        pytest.param(
            ["--optimizer=adam", "--budget_macs=0.5", "--policy=hard_concrete", "--curvature=1e-4"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda more: " ".join(more),
)
def test_interrupted_run_goes_on_survives_a_failing_export_and_equals_the_undisturbed_one(
    flags, tmp_path, monkeypatch, capsys, more
):
    flags = [*flags, *more]
    assert run(*flags, f"--output_dir={tmp_path / 'whole'}") == 0
    assert "The first step is traced before it runs" in capsys.readouterr().out

    # SIGTERM in the middle of the second epoch.
    seen, end = [], Backup.on_train_batch_end

    def signalling(backup, batch, logs=None):
        seen.append(batch)
        if len(seen) == 12:
            signal.raise_signal(signal.SIGTERM)
        end(backup, batch, logs)

    monkeypatch.setattr(Backup, "on_train_batch_end", signalling)
    out, kept = tmp_path / "out", tmp_path / "out.resume"
    assert run(*flags, f"--output_dir={out}") == 143
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == (
        "kfacprune train: stopped by SIGTERM; The training of the pruned network, 1 of 3 epochs "
        f"and 4 of 8 steps of the next, is kept in {kept}. Go on with: kfacprune train --resume "
        f"--output_dir={out}"
    )
    assert progress(kept / "pruned") == "1 of 3 epochs and 4 of 8 steps of the next"
    assert not out.exists()

    # Without a word about it, a new run does not touch what is kept.
    assert run(*flags, f"--output_dir={out}") == 1
    assert "Go on with --resume, or discard it with --overwrite" in capsys.readouterr().err
    assert run("--resume", "--epochs=4", f"--output_dir={out}") == 2
    assert "--epochs=4: the interrupted run" in capsys.readouterr().err

    # It goes on with its flags; the export fails after the training.
    def failing(*_, **__):
        raise ExportError("no room for saved_model")

    monkeypatch.setattr(train, "saved_model", failing)
    assert run("--resume", f"--output_dir={out}") == 1
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert "goes on after 1 of 3 epochs and 4 of 8 steps" in captured.out
    assert f"The trained model is kept in {kept / 'model.keras'}. Go on with" in captured.err
    assert not out.exists()
    for found, expected in zip(
        weights(kept / "model.keras"), weights(tmp_path / "whole" / "model.keras"), strict=True
    ):
        np.testing.assert_array_equal(found, expected)

    # What is trained is not trained again.
    def trained_again(*_, **__):
        raise KFACPruneError("trained again")

    monkeypatch.setattr(PrunableModel, "fit", trained_again)
    shutil.copytree(kept, tmp_path / "copy")
    assert run("--resume", f"--output_dir={out}") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out", "whole"]
    compact, expected = (weights(tmp_path / name / "compact.keras") for name in ("out", "whole"))
    for found, wanted in zip(compact, expected, strict=True):
        if found.dtype.kind == "f":  # seeds of noise are drawn when the compact layers are made
            np.testing.assert_array_equal(found, wanted)
    records = [json.loads((tmp_path / n / "record.json").read_text()) for n in ("out", "whole")]
    for record in records:  # the command of the run, not of the last call
        command = record.pop("command")
        assert "--epochs=3" in command
        assert "--resume" not in command
    assert records[0] == records[1]

    # Killed after the output was written, before what was kept is removed.
    capsys.readouterr()
    (tmp_path / "copy").rename(kept)
    assert run("--resume", f"--output_dir={out}") == 0
    assert capsys.readouterr().out == f"{out} is complete.\n"
    assert not kept.exists()


@pytest.fixture
def kept(flags, tmp_path):
    """An interrupted run, without the training."""
    run_of_flags = KeptRun(parsed(*flags, f"--output_dir={tmp_path / 'out'}"))
    (run_of_flags.folder / "run.json").write_text(json.dumps(_content(flags, tmp_path)))
    (run_of_flags.folder / "model.keras").write_bytes(b"model")
    error = KeyboardInterrupt()
    run_of_flags.__exit__(type(error), error, None)
    assert "Go on with: kfacprune train --resume" in error.__notes__[0]
    return tmp_path / "out.resume"


def _content(flags, folder):
    values = parsed(*flags, f"--output_dir={folder / 'out'}")
    named = {name: values[name].value for name in values if name not in ("output_dir", "resume")}
    return {"flags": named, "data": 0, "model": 0, "versions": {}}


def test_flags_that_were_not_given_are_those_of_the_interrupted_run(kept, tmp_path):
    values = parsed("--resume", f"--output_dir={tmp_path / 'out'}", "--seed=3")
    with KeptRun(values) as again:
        assert again.is_resumed
        assert values.epochs == 3
        assert values.learning_rate == 0.01
    assert not kept.exists()  # the run has ended without an error


def test_second_run_on_one_output_is_refused_at_its_start(kept, flags, tmp_path, capsys):
    lock = LockedFolder(kept, "")
    for more in ([], ["--resume"], ["--overwrite"]):
        assert run(*flags, *more, f"--output_dir={tmp_path / 'out'}") == 1
        assert "out is taken by another run: process" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "out")  # the same folder by another name
    assert run(*flags, f"--output_dir={tmp_path / 'link'}") == 1
    assert "link is taken by another run" in capsys.readouterr().err
    assert (kept / "model.keras").read_bytes() == b"model"
    lock.release()


def test_overwrite_discards_what_is_kept(kept, flags, tmp_path):
    with KeptRun(parsed(*flags, "--overwrite", f"--output_dir={tmp_path / 'out'}")) as again:
        assert not again.is_resumed
        assert [path.name for path in kept.iterdir()] == ["lock"]
    assert not kept.exists()


def test_other_data_are_refused(kept, tmp_path, capsys):
    assert run("--resume", f"--output_dir={tmp_path / 'out'}") == 2
    assert "bars.npz: not what the interrupted run" in capsys.readouterr().err
    assert (kept / "model.keras").exists()


@pytest.mark.parametrize("content", ["", "[1]", "{}", "[" * 100_000])
def test_damaged_run_is_named(kept, tmp_path, capsys, content):
    (kept / "run.json").write_text(content)
    assert run("--resume", f"--output_dir={tmp_path / 'out'}") == 2
    assert "run.json: the interrupted run cannot be read" in capsys.readouterr().err
    assert (kept / "model.keras").exists()


def test_folder_of_somebody_else_is_left_alone(flags, tmp_path, capsys):
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "letters.txt").write_text("mine")
    assert run(*flags, "--overwrite", f"--output_dir={tmp_path / 'out'}") == 1
    assert "holds something else: letters.txt" in capsys.readouterr().err
    assert (tmp_path / "out.resume" / "letters.txt").read_text() == "mine"


def test_resuming_nothing_says_so_and_begins(flags, tmp_path, capsys, monkeypatch):
    def begun(*_, **__):
        raise KFACPruneError("begun")

    monkeypatch.setattr(PrunableModel, "fit", begun)
    assert run(*flags, "--resume", f"--output_dir={tmp_path / 'out'}") == 1
    captured = capsys.readouterr()
    assert "Nothing to resume" in captured.out
    assert captured.err == "kfacprune train: error: begun\n"
    assert not list(tmp_path.iterdir())
