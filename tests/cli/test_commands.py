"""The command line: one run from training to evaluation, and every wrong turn on the way."""

from __future__ import annotations

import json
import sys

import keras
import numpy as np
import pytest

from tf_kfacprune.cli.main import main, run
from tf_kfacprune.export import read_metadata


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Two classes that a ruler could tell apart, as an .npz file."""
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 96)
    x = rng.normal(0.2, 0.05, (96, 8, 8, 1)).clip(0, 1).astype("float32")
    x[y == 1, :, 4:] += 0.6
    np.savez(path, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_data):
    out = tmp_path_factory.mktemp("run") / "out"
    status = main(
        [
            "train",
            f"--data={small_data}",
            "--budget_macs=0.3",
            "--epochs=5",
            "--batch_size=8",
            "--curvature=1e-4",
            f"--output_dir={out}",
        ]
    )
    assert status == 0
    return out


def failure(capsys, *arguments) -> str:
    """Standard error of a command that must fail with a single line and no traceback."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status != 0
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_train_writes_everything_it_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "model.keras",
        "compact.keras",
        "compact.tflite",
        "saved_model",
        "record.json",
        "report.html",
    }
    assert "<h2>The run</h2>" in (trained / "report.html").read_text()
    record = json.loads((trained / "record.json").read_text())
    assert record["budget"]["asked"] == {"macs": 0.3}
    assert record["budget"]["achieved"]["macs"] <= 0.3 + 1e-9
    assert record["data"] == "bars"
    compact_model = keras.models.load_model(trained / "compact.keras")
    assert compact_model.count_params() == record["compact"]["params"]
    pruning = read_metadata(trained / "compact.tflite").pruning
    for key in ("budget", "kept_neurons", "versions"):
        assert pruning[key] == record[key]
    assert pruning["compact"]["params"] == record["compact"]["params"]


def test_evaluate_agrees_between_formats_and_with_the_record(trained, small_data, capsys):
    capsys.readouterr()
    accuracy = json.loads((trained / "record.json").read_text())["compact"]["accuracy"]
    for name in ("compact.keras", "compact.tflite", "model.keras"):
        assert main(["evaluate", f"--model={trained / name}", f"--data={small_data}"]) == 0
        assert f"accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out


def test_compact_and_export_continue_from_the_files(trained, small_data, tmp_path, capsys):
    small = tmp_path / "small.keras"
    assert main(["compact", f"--model={trained / 'model.keras'}", f"--output={small}"]) == 0
    assert "macs:" in capsys.readouterr().out
    for arguments in (
        ["--format=tflite", "--quantization=float16", f"--output={tmp_path / 'half.tflite'}"],
        ["--format=saved_model", f"--output={tmp_path / 'served'}", f"--data={small_data}"],
    ):
        assert main(["export", f"--model={small}", *arguments]) == 0
    assert (tmp_path / "half.tflite").stat().st_size > 0
    assert (tmp_path / "served" / "saved_model.pb").is_file()


def test_inspect_shows_flattened_features(capsys):
    assert main(["inspect", "--model=lenet5", "--prune_features"]) == 0
    assert "flatten" in capsys.readouterr().out


def test_inspect_shows_groups_of_built_in_networks(capsys):
    assert main(["inspect", "--model=lenet300", "--prune_inputs"]) == 0
    shown = capsys.readouterr().out
    assert "266,610" in shown
    assert "fc2" in shown
    assert main(["inspect", "--model=lenet300", "--include=fc1"]) == 0
    shown = capsys.readouterr().out
    assert "300 neurons can be pruned" in shown
    assert "not included by the caller" in shown


def test_an_existing_folder_is_refused_before_training(trained, small_data, capsys):
    error = failure(
        capsys, "train", f"--data={small_data}", "--budget_macs=0.3", f"--output_dir={trained}"
    )
    assert "already exists" in error


def test_an_error_after_training_started_leaves_nothing_behind(tmp_path, capsys):
    out = tmp_path / "out"
    error = failure(capsys, "train", "--budget_macs=1e-6", f"--output_dir={out}")
    assert "cannot be reached" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], "output_dir"),
        (["train", "--output_dir=o", "--nonsense=1"], "nonsense"),
        (["train", "--output_dir=o", "--epochs=zero"], "epochs"),
        (["train", "--output_dir=o", "--epochs=0"], "epochs"),
        (["train", "--output_dir=o", "extra"], "extra"),
        (["train", "--output_dir=o", "--budget_macs=1.5"], "macs=1.5"),
        (["train", "--output_dir=o", "--budget_macs=0"], "macs=0"),
        (["train", "--output_dir=o", "--round_to=0"], "round_to"),
        (["train", "--output_dir=o", "--budget_macs=0.01", "--round_to=16"], "round_to=16"),
        (["train", "--output_dir=o", "--budget_macs=0.01", "--min_channels=9"], "min_channels=9"),
        (["train", "--output_dir=o", "--budget_macs=0.5", "--include=nowhere"], "nowhere"),
        (["inspect", "--model=lenet300", "--exclude=fc1,fc9"], "fc9"),
        (["train", "--output_dir=o", "--data=digit"], "digit"),
        (["train", "--output_dir=o", "--data=missing.npz"], "missing.npz"),
        (["train", "--output_dir=o", "--data=mnist", "--data_dir=nowhere"], "nowhere"),
        (["train", "--output_dir=o", "--model=alexnet"], "alexnet"),
        (["train", "--output_dir=o", "--model=missing.keras"], "missing.keras"),
        (["train", "--output_dir=o", "--model=lenet5"], "lenet5"),
        (["train", "--output_dir=o", "--validation=99999"], "99999"),
        (["inspect", "--model=alexnet"], "alexnet"),
        (["compact", "--model=missing.keras", "--output=o.keras"], "missing.keras"),
        (["compact", "--model=lenet5", "--output=o.keras"], "lenet5"),
        (["export", "--model=missing.keras", "--output=o.tflite"], "missing.keras"),
        (["export", "--model=m.keras", "--output=o", "--format=onnx"], "onnx"),
        (["evaluate", "--model=missing.tflite"], "missing.tflite"),
        (["evaluate", "--model=model.onnx"], "model.onnx"),
        (["trian"], "'train'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_input_is_named_in_one_line(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_truncated_model_is_a_clear_error(trained, tmp_path, capsys):
    damaged = tmp_path / "damaged.keras"
    damaged.write_bytes((trained / "compact.keras").read_bytes()[:2000])
    for command in (
        ["evaluate"],
        ["compact", "--output=o.keras"],
        ["export", "--output=o.tflite"],
        ["inspect"],
    ):
        error = failure(capsys, *command, f"--model={damaged}")
        assert "damaged.keras" in error
        assert "truncated" in error


def test_a_gated_model_is_not_exported_and_a_plain_one_not_compacted(trained, tmp_path, capsys):
    error = failure(
        capsys, "export", f"--model={trained / 'model.keras'}", f"--output={tmp_path / 'o.tflite'}"
    )
    assert "compact" in error
    assert not list(tmp_path.iterdir())


def test_data_of_another_shape_are_refused(trained, capsys, tmp_path):
    path = tmp_path / "other.npz"
    x, y = np.zeros((4, 5, 5, 1), "float32"), np.array([0, 1, 0, 1])
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    error = failure(capsys, "evaluate", f"--model={trained / 'compact.keras'}", f"--data={path}")
    assert "(8, 8, 1)" in error
    assert "(5, 5, 1)" in error


def test_debug_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(Exception, match=r"missing\.keras"):
        main(["evaluate", "--model=missing.keras", "--debug"])


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for command in ("train", "inspect", "compact", "export", "evaluate"):
        assert f"\n  {command} " in shown


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) != 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "inspect", "compact", "export", "evaluate"])
def test_help_of_a_command_lists_its_flags(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--model" in capsys.readouterr().out


def test_the_program_ends_with_the_status_of_its_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kfacprune", "evaluate", "--model=missing.keras"])
    with pytest.raises(SystemExit) as exited:
        run()
    assert exited.value.code == 1
    assert "missing.keras" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.utils, "set_random_seed", interrupted)
    assert "interrupted" in failure(capsys, "train", f"--output_dir={tmp_path / 'out'}")
    assert not list(tmp_path.iterdir())
