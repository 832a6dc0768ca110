"""Wrong turns: one line that names the flag, status 2 for the command line, 1 for failures."""

from __future__ import annotations

import os
import socket
import warnings

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.cli.main import main

TRAIN = ["train", "--model=out2.keras", "--data=bars.npz", "--output_dir=new"]
EXPORT = ["export", "--model=out2.keras", "--output=new.tflite"]
BENCHMARK = ["benchmark", "--blocks=1", "--formats=float32", "--model=out2.keras"]


@pytest.fixture(scope="module")
def place(small):
    """Odd models and files beside the usual ones."""
    image = keras.Input((4, 4, 1), name="image")
    flat = keras.layers.Flatten()(image)
    dense = keras.layers.Dense
    keras.Model(image, [dense(2)(flat), dense(2)(flat)], name="two").save(small / "heads.keras")
    other = keras.Input((4,))
    joined = keras.layers.Concatenate()([flat, other])
    keras.Model([image, other], dense(2)(joined)).save(small / "inputs.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of saving what is not built
        keras.Sequential([keras.layers.Flatten(), dense(2)]).save(small / "unbuilt.keras")
    spoilt = keras.models.load_model(small / "out2.keras")
    spoilt.get_layer("out").bias.assign([np.nan, 0.0])
    spoilt.save(small / "nan.keras")
    spoilt.get_layer("out").bias.assign([np.inf, 0.0])
    spoilt.save(small / "inf.keras")
    frozen = keras.models.load_model(small / "out2.keras")
    frozen.trainable = False
    frozen.save(small / "frozen.keras")
    (small / "linked.keras").symlink_to("out2.keras")
    whole = keras.Input((4, 4, 1), dtype="int32")
    scaled = keras.layers.Rescaling(1.0)(keras.layers.Flatten()(whole))
    keras.Model(whole, dense(2)(scaled)).save(small / "integers.keras")
    to_prune = keras.models.load_model(small / "out2.keras")
    kp.PrunableModel(to_prune, kp.Budget(macs=0.5)).save(small / "gated.keras")
    with np.load(small / "bars.npz") as bars:
        np.savez(small / "one_class.npz", **{**bars, "y_train": np.ones(64, int)})
    (small / "exits.py").write_text("raise SystemExit(7)\n")
    (small / "deep.json").write_text("[" * 100_000)
    (small / "broken_module.py").write_text("1 / 0\n")
    os.mkfifo(small / "fifo")
    return small


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([*TRAIN, "--seed=-1"], 2, "--seed=-1"),
        ([*TRAIN, "--seed=99999999999999999999999"], 2, "--seed=9999"),
        ([*TRAIN, "--seed=4294967296"], 2, "--seed=4294967296"),
        ([*TRAIN, "--seed=1.5"], 2, "--seed=1.5"),
        ([*TRAIN, "--learning_rate=-1"], 2, "--learning_rate=-1"),
        ([*TRAIN, "--learning_rate=0"], 2, "--learning_rate=0"),
        ([*TRAIN, "--learning_rate=nan"], 2, "--learning_rate=nan"),
        ([*TRAIN, "--learning_rate=inf"], 2, "--learning_rate=inf"),
        ([*TRAIN, "--curvature=inf"], 2, "--curvature=inf"),
        ([*TRAIN, "--curvature=nan"], 2, "--curvature=nan"),
        ([*TRAIN, "--curvature=-1"], 2, "--curvature=-1"),
        ([*TRAIN, "--budget_macs=nan"], 2, "--budget_macs=nan"),
        ([*TRAIN, "--budget_macs=1.5"], 2, "--budget_macs=1.5"),
        ([*TRAIN, "--budget_params=-0.1"], 2, "--budget_params=-0.1"),
        ([*TRAIN, "--budget_bytes=inf"], 2, "--budget_bytes=inf"),
        ([*TRAIN, "--budget_bytes=5e29"], 2, "--budget_bytes=5e+29: the network costs"),
        ([*TRAIN, "--budget_bytes=1000000"], 2, "--budget_bytes=1e+06: the network costs"),
        ([*TRAIN, "--budget_bytes=1000.5"], 2, "--budget_bytes"),
        ([*TRAIN, "--flash=lots"], 2, "--flash: `flash` of a board must be a number of bytes"),
        ([*TRAIN, "--ram=-1"], 2, "--ram: Budget `ram` must be a fraction"),
        ([*TRAIN, "--ram=nan"], 2, "--ram: `ram` of a board must be a number of bytes"),
        ([*TRAIN, "--flash=64"], 2, "--flash: Budget flash=64 cannot be reached"),
        ([*TRAIN, "--flash=1MB", "--ram=1MiB"], 2, "--flash=1e+06: the network costs"),
        ([*TRAIN, "--budget_macs=1e-9"], 2, "--budget_macs: Budget macs=1e-09 cannot be reached"),
        ([*TRAIN, "--budget_macs=0.5", "--include=("], 2, "--include: '('"),
        ([*TRAIN, "--budget_macs=0.5", "--exclude=*"], 2, "--exclude: '*'"),
        ([*TRAIN, "--include=fc1"], 2, "include=['fc1']"),
        (["inspect", "--model=lenet300", "--include=["], 2, "--include: '['"),
        ([*TRAIN, "--epochs=-3"], 2, "--epochs=-3"),
        ([*TRAIN, "--batch_size=0"], 2, "--batch_size=0"),
        ([*TRAIN, "--epochs=1000000000000"], 2, "--epochs=1000000000000"),
        ([*TRAIN, "--batch_size=2147483648"], 2, "--batch_size=2147483648"),
        ([*TRAIN, "--validation=2147483648"], 2, "--validation=2147483648"),
        ([*TRAIN, "--round_to=2147483648"], 2, "--round_to=2147483648"),
        ([*TRAIN, "--budget_macs=0.5", "--epochs=1", "--batch_size=64"], 2, "that is one step"),
        ([*TRAIN, "--learning_rate=1e300"], 2, "--learning_rate=1e300: must be a finite number"),
        ([*TRAIN, "--curvature=1e300"], 2, "--curvature=1e300: must be a finite number"),
        ([*TRAIN, f"--flash={'9' * 400}"], 2, "--flash: `flash` of a board must be a number"),
        ([*TRAIN, "--validation=64"], 2, "--validation"),
        ([*TRAIN, "--loss=hinge"], 2, "--loss=hinge"),
        ([*TRAIN, "--metric=mean_squared_error"], 2, "--metric=mean_squared_error"),
        ([*TRAIN, "--loss=mean_squared_error"], 2, "has 2 outputs"),
        ([*TRAIN, "--data=onehot.npz"], 1, "looks like one-hot"),
        ([*TRAIN, "--data=ten.npz"], 2, "--data: model 'net' has 2 outputs"),
        ([*TRAIN, "--data=values.npz"], 2, "--data: model 'net' has 2 outputs"),
        ([*TRAIN, "--data=digits"], 2, "--data"),
        ([*TRAIN, "--model=heads.keras"], 2, "--model: the command line measures models"),
        ([*TRAIN, "--model=inputs.keras"], 2, "--model: the command line needs"),
        ([*TRAIN, "--model=unbuilt.keras"], 1, "--model=unbuilt.keras: the model is not built"),
        ([*TRAIN, "--import=no_such_module"], 2, "--import=no_such_module"),
        ([*TRAIN, "--import=broken_module"], 1, "--import=broken_module: the module raises Zero"),
        ([*TRAIN, "--import=a/b.py"], 2, "--import must be names of modules"),
        ([*TRAIN, "--output_dir=fifo", "--overwrite"], 1, "fifo is a FIFO"),
        ([*TRAIN, "--output_dir="], 1, "not a path that can be written"),
        ([*TRAIN, "--output_dir=bars.npz", "--overwrite"], 1, "is not a folder with record.json"),
        ([*TRAIN, "--import=exits"], 1, "--import=exits: the module raises SystemExit: 7"),
        (TRAIN[:3], 2, "--output_dir is required: Folder"),
        ([*TRAIN, "--model=gated.keras"], 2, "is a PrunableModel, saved by an earlier run"),
        ([*TRAIN, "--data=one_class.npz"], 2, "are of class 1, so that there is nothing"),
        ([*TRAIN, "--model=integers.keras"], 2, "takes examples of dtype int32"),
        ([*TRAIN, "--model=frozen.keras"], 1, "has no trainable weights"),
        ([*TRAIN, "--learning_rate=1e38", "--optimizer=sgd", "--epochs=1"], 1, "has diverged"),
        ([*TRAIN, "--flagfile=missing"], 2, "missing"),
        ([*TRAIN, "--flagfile=bars.npz"], 2, "--flagfile must name files of text"),
        ([*EXPORT, "--batch_size=2147483648"], 2, "--batch_size=2147483648"),
        ([*BENCHMARK, "--dense=out2.keras", "--blocks=1000001"], 2, "--blocks=1000001"),
        ([*BENCHMARK, "--dense=out2.keras", "--threads=1025"], 2, "--threads must be"),
        ([*BENCHMARK, "--dense=out2.keras", "--threads=\u00b2"], 2, "--threads must be"),
        ([*EXPORT, "--output=out2.keras", "--overwrite"], 2, "is the file of --model"),
        ([*EXPORT, "--output=linked.keras", "--overwrite"], 2, "is the file of --model"),
        (["compact", "--model=gated.keras", "--output=gated.keras"], 2, "is the file of --model"),
        (["compact", "--model=gated.keras", "--output=new.keras"], 1, "not on its budget (macs"),
        ([*BENCHMARK, "--dense=out2.keras", "--json=out2.keras"], 2, "is the file of --model"),
        ([*EXPORT, "--labels=a,a"], 2, "--labels must be different names"),
        ([*EXPORT, "--labels=a,"], 2, "none of them empty"),
        (["evaluate", "--model=inf.keras", "--data=bars.npz"], 1, "'out/bias' holds NaN or inf"),
        (["evaluate", "--model=out2.keras", "--data=bars.npz", "--threshold=0.5"], 2, "no effect"),
        ([*EXPORT, "--scale=1e300"], 2, "--scale=1e300: must be a finite number of float32"),
        ([*EXPORT, "--scale=1e-300"], 2, "both in float32. Received: scale=1e-300"),
        ([*BENCHMARK, "--dense=out2.keras", "--plot=a.gif"], 2, "must end in one of .png"),
        ([*BENCHMARK, "--dense=out2.keras", "--json=bars.npz"], 1, "bars.npz already exists"),
        ([*EXPORT, "--labels=a,b,c"], 2, "--labels must name every class"),
        ([*EXPORT, "--labels=a"], 2, "--labels must name every class"),
        ([*EXPORT, "--data=digits", "--labels=a,b"], 2, "--data"),
        ([*EXPORT, "--record=deep.json"], 1, "--record=deep.json (RecursionError"),
        ([*EXPORT, "--record=bars.npz"], 1, "--record=bars.npz"),
        ([*EXPORT, "--scale=inf"], 2, "--scale=inf"),
        ([*EXPORT, "--offset=nan"], 2, "--offset=nan"),
        ([*EXPORT, "--model=unbuilt.keras"], 1, "--model=unbuilt.keras: the model is not built"),
        ([*EXPORT, "--model=nan.keras"], 1, "--model=nan.keras: weight 'out/bias' holds NaN"),
        ([*EXPORT, "--output=fifo", "--overwrite"], 1, "fifo is a FIFO"),
        ([*EXPORT, f"--output={os.devnull}", "--overwrite"], 1, "is a character device"),
        (["compact", "--model=unbuilt.keras", "--output=new.keras"], 1, "is not built"),
        (["inspect", "--model=unbuilt.keras"], 1, "is not built"),
        (["evaluate", "--model=nan.keras", "--data=bars.npz"], 1, "'out/bias' holds NaN"),
        (["evaluate", "--model=unbuilt.keras", "--data=bars.npz"], 1, "is not built"),
        (["evaluate", "--model=heads.keras", "--data=bars.npz"], 2, "--model: the command line"),
        (["evaluate", "--model=inputs.keras", "--data=bars.npz"], 2, "--model: the command line"),
        (["evaluate", "--model=out2.keras", "--data=ten.npz"], 2, "has 2 outputs"),
        (["evaluate", "--model=out2.keras", "--data=digits"], 2, "--data"),
        (["evaluate", "--model=out1.keras", "--threshold=nan"], 2, "--threshold=nan"),
        ([*BENCHMARK, "--dense=out3.keras"], 2, "--dense=out3.keras returns"),
        ([*BENCHMARK, "--dense=lenet300"], 2, "--dense=lenet300 takes"),
        ([*BENCHMARK, "--dense=unbuilt.keras"], 1, "--dense=unbuilt.keras: the model is not built"),
        ([*BENCHMARK, "--dense=no_such_net"], 2, "--dense=no_such_net"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_turn_is_one_line_with_its_status(here, capsys, arguments, status, said):
    before = sorted(os.listdir(here))
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1, error
    assert sorted(name for name in os.listdir(here) if name != "__pycache__") == [
        name for name in before if name != "__pycache__"
    ]


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb"], ids=["NUL", "not UTF-8"])
@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *(("train", name) for name in ("model", "data", "data_dir", "import", "output_dir")),
        *(("export", name) for name in ("output", "record", "labels")),
        *(("benchmark", name) for name in ("dense", "json", "plot")),
    ],
)
def test_text_that_no_path_can_have_is_refused_by_name(here, capsys, command, flag, text):
    required = {"train": TRAIN, "export": EXPORT, "benchmark": [*BENCHMARK, "--dense=out2.keras"]}
    assert main([*required[command], f"--{flag}={text}"]) == 2
    error = capsys.readouterr().err
    assert f"--{flag}" in error
    assert error.count("\n") == 1


def test_names_are_counted_as_classes_for_a_single_output(here, tmp_path):
    arguments = ["export", "--model=sigmoid.keras", f"--output={tmp_path / 'a.tflite'}"]
    assert main([*arguments, "--labels=no,yes"]) == 0


def test_layers_of_an_imported_module_are_known(here, capsys):
    (here / "my_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2 * x\n"
    )
    image = keras.Input((4, 4, 1))
    assert main(["inspect", "--model=out2.keras", "--import=my_layers"]) == 0
    twice = keras.saving.get_registered_object("mine>Twice")
    keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(twice()(image)))).save(
        here / "custom.keras"
    )
    evaluated = ["evaluate", "--model=custom.keras", "--data=bars.npz"]
    assert main([*evaluated, "--import=my_layers"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_help_marks_what_is_required_and_tells_statuses_and_links(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(required)") == 1
    assert "  --output_dir (required)\n" in shown
    assert "--epochs [30]" in shown
    assert "--seed [0]" in shown
    assert "symbolic link is followed" in shown
    assert "2    a flag is wrong" in shown
    assert main(["export", "--help"]) == 0
    assert "  --model (required)\n" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert f"keras {keras.__version__}" in shown
    assert "tf_kfacprune " in shown


def test_socket_is_not_replaced(tmp_path, monkeypatch, capsys, small):
    monkeypatch.chdir(tmp_path)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket")
    listening.close()
    arguments = ["export", f"--model={small / 'out2.keras'}", "--output=socket", "--overwrite"]
    assert main(arguments) == 1
    assert "is a socket" in capsys.readouterr().err
