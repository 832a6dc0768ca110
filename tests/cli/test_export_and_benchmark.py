"""The commands that end at the device: every format, metadata inside, figures side by side."""

from __future__ import annotations

import json
import re

import keras
import numpy as np
import pytest

from tf_kfacprune.cli.main import main
from tf_kfacprune.export import read_metadata, run_tflite


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two classes that a ruler could tell apart, and a network that does."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 96)
    x = rng.normal(0.2, 0.05, (96, 8, 8, 1)).clip(0, 1).astype("float32")
    x[y == 1, :, 4:] += 0.6
    np.savez(folder / "bars.npz", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    image = keras.Input((8, 8, 1), name="image")
    pooled = keras.layers.Flatten()(keras.layers.AveragePooling2D(4)(image))
    last = keras.layers.Dense(2, name="fc")
    model = keras.Model(image, last(pooled))
    last.kernel.assign([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 4.0]])
    last.bias.assign([2.5, 0.0])
    model.save(folder / "net.keras")
    record = {"budget": {"asked": {"macs": 0.3}}, "kept_neurons": {"fc": [0, 1]}, "versions": {}}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("quantization", ["int8", "int16x8", "float16"])
def test_file_says_what_it_is_and_decides(files, tmp_path, quantization):
    path = tmp_path / "net.tflite"
    status = run(
        "export",
        f"--model={files / 'net.keras'}",
        f"--data={files / 'bars.npz'}",
        f"--quantization={quantization}",
        "--io_dtype=float32",
        "--batch_size=1",
        "--scale=0.5",
        "--labels=left,right",
        f"--record={files / 'record.json'}",
        f"--output={path}",
    )
    assert status == 0
    metadata = read_metadata(path)
    assert metadata.labels == ("left", "right")
    assert metadata.pruning["budget"] == {"asked": {"macs": 0.3}}
    with np.load(files / "bars.npz") as data:
        found = run_tflite(path, 2 * data["x_test"]).argmax(axis=1)
        np.testing.assert_array_equal(found, data["y_test"])


def test_head_and_c_header(files, tmp_path):
    options = [f"--model={files / 'net.keras'}", f"--data={files / 'bars.npz'}"]
    assert run("export", *options, "--head=argmax", f"--output={tmp_path / 'a.tflite'}") == 0
    assert run_tflite(tmp_path / "a.tflite", np.zeros((1, 8, 8, 1))).dtype == np.int32
    header = tmp_path / "net.h"
    arguments = ["--format=c_array", "--quantization=int8", "--name=bars", f"--output={header}"]
    assert run("export", *options, *arguments) == 0
    text = header.read_text()
    for part in ("#ifndef BARS_H_", "bars_arena_bytes", "bars_input_0_shape[4] = {1, 8, 8, 1}"):
        assert part in text
    # For batches of any size the file would have to find out how many examples there are.
    assert not re.search(r"Operators: .*\bSHAPE\b", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tflite", "net.h"]


@pytest.mark.slow
def test_benchmark_prints_and_writes_its_figures(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status = run(
        "benchmark",
        f"--dense={files / 'net.keras'}",
        f"--model={files / 'net.keras'}",
        f"--data={files / 'bars.npz'}",
        "--formats=float32,int8",
        "--blocks=1",
        f"--json={tmp_path / 'figures.json'}",
        f"--plot={tmp_path / 'figures.png'}",
    )
    assert status == 0
    assert capsys.readouterr().out.count("100.00 %") == 4
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["model"], row["quantization"]) for row in rows] == [
        ("dense", None),
        ("dense", "int8"),
        ("compact", None),
        ("compact", "int8"),
    ]
    assert (tmp_path / "figures.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "--quantization=int8"], "needs --data"),
        (["export", "--quantization=int3"], "quantization must be one of"),
        (["export", "--format=saved_model", "--quantization=int8"], "for --format=tflite"),
        (["export", "--format=saved_model", "--labels=a,b"], "for --format=tflite"),
        (["export", "--format=saved_model", "--name=net"], "--name is for --format=c_array"),
        (["export", "--format=c_array", "--name=int"], "name must be a C identifier"),
        (["export", "--record=missing.json"], "--record=missing.json"),
        (["export", "--scale=0"], "scale must be a finite number"),
        (["export", "--max_accuracy_drop=3"], "max_accuracy_drop must be"),
        (["benchmark", "--formats=int3"], "--formats=int3"),
        (["benchmark", "--threads=0"], "--threads must be integers from 1"),
        (["benchmark", "--plot=a.bmp", "--blocks=1"], "a.bmp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_are_named(files, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    model = files / "net.keras"
    own = {
        "export": [f"--model={model}", "--output=out"],
        "benchmark": [f"--dense={model}", f"--model={model}"],
    }
    assert run(*arguments, *own[arguments[0]]) != 0
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
