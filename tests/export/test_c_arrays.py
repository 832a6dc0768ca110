"""The C array holds the file, byte by byte, and says how much memory it needs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess

import keras
import pytest

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export import activation_bytes, arena_bytes, c_array, tflite


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    x = keras.Input((8,), name="x")
    hidden = keras.layers.Dense(64, activation="relu")(x)
    model = keras.Model(x, keras.layers.Dense(16)(hidden))
    folder = tmp_path_factory.mktemp("c")
    return tflite(model, folder / "net.tflite", batch_size=1, verify=False)


def test_header_holds_the_file(file, tmp_path):
    text = c_array(file, tmp_path / "net.h", name="net").read_text()
    body = re.search(r"net\[\].*?\{(.*?)\}", text, re.DOTALL)[1]
    assert bytes(int(byte, 16) for byte in re.findall(r"0x(\w\w)", body)) == file.read_bytes()
    assert f"net_len = {file.stat().st_size} " in text


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_header_compiles(file, tmp_path):
    c_array(file, tmp_path / "net.h", name="net")
    program = (
        '#include <stdio.h>\n#include "net.h"\n'
        'int main(void) { printf("%zu %d %.4s", sizeof net, net_len, net + 4); return 0; }\n'
    )
    (tmp_path / "main.c").write_text(program)
    subprocess.run(["cc", "main.c", "-o", "main"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    size = file.stat().st_size
    assert done.stdout == f"{size} {size} TFL3"


def test_activations_that_live_together_are_counted_together(file):
    # The hidden layer lives with the input, then with the output: 4 * (64 + max(8, 16)) bytes.
    assert activation_bytes(file) == 4 * (64 + 16)


def test_arena_of_the_header_holds_activations_and_records(file, tmp_path):
    text = c_array(file, tmp_path / "net.h", name="net").read_text()
    promised = int(re.search(r"net_arena_bytes = (\d+) ", text)[1])
    activations = activation_bytes(file)
    assert activations + 1024 < promised < activations + 2048
    is_measured = importlib.util.find_spec("tflite_micro") is not None
    assert ("measured with TensorFlow Lite Micro" in text) == is_measured


def test_an_arena_that_was_not_measured_is_called_an_estimate(file, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = c_array(file, tmp_path / "net.h").read_text()
    assert "an estimate, without TensorFlow Lite Micro" in text
    assert f"model_arena_bytes = {arena_bytes(file)} " in text


def test_bad_name_missing_and_damaged_file_are_refused(file, tmp_path):
    with pytest.raises(InvalidArgumentError, match="'my-net'"):
        c_array(file, tmp_path / "net.h", name="my-net")
    with pytest.raises(ExportError, match="no such file"):
        c_array(tmp_path / "none.tflite", tmp_path / "net.h")
    (tmp_path / "half.tflite").write_bytes(file.read_bytes()[:300])
    with pytest.raises(ExportError, match="damaged"):
        c_array(tmp_path / "half.tflite", tmp_path / "net.h")
    assert os.listdir(tmp_path) == ["half.tflite"]


def test_existing_header_is_refused(file, tmp_path):
    (tmp_path / "net.h").write_text("old")
    with pytest.raises(ExportError, match="already exists"):
        c_array(file, tmp_path / "net.h")
