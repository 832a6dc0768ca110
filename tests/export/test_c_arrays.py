"""The C array holds the file, byte by byte, and says how much memory it needs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import textwrap

import keras
import numpy as np
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


RESOLVER = """
    #include <cstdio>
    #include "net.h"
    enum Status { kOk = 0, kError = 1 };
    struct Resolver {  // as tflite::MicroMutableOpResolver
      unsigned room;
      Status add(const char* name) {
        if (room == 0) return kError;
        --room;
        std::printf(" %s", name);
        return kOk;
      }
      Status AddConv2D() { return add("conv"); }
      Status AddReshape() { return add("reshape"); }
      Status AddFullyConnected() { return add("fc"); }
      Status AddMaxPool2D() { return add("pool"); }
    };
    int main() {
      static_assert(sizeof(net_input_0_type) == 1 && sizeof(net_output_0_type) == 1, "int8");
      static_assert(net_input_0_rank == 4 && net_output_0_rank == 2, "ranks");
      std::printf("%d %d %d %d", net_input_count, net_output_count, net_input_0_size,
                  net_output_0_size);
      for (int size : net_input_0_shape) std::printf(" %d", size);
      for (int size : net_output_0_shape) std::printf(" %d", size);
      std::printf(" %.9g %d %.9g %d", net_input_0_scale, net_input_0_zero_point,
                  net_output_0_scale, net_output_0_zero_point);
      Resolver large{net_operator_count}, small{net_operator_count - 1};
      bool added = net_add_operators(large);
      std::printf(" %d %u", added, large.room);
      std::printf(" %d", net_add_operators(small));
    }
    """


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """An int8 file with a convolution, pooling and a dense layer."""
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 6, 1), name="image")
    y = keras.layers.MaxPooling2D()(keras.layers.Conv2D(3, 3, activation="relu")(image))
    model = keras.Model(image, keras.layers.Dense(5)(keras.layers.Flatten()(y)))
    data = np.random.default_rng(0).random((20, 6, 6, 1), "float32")
    folder = tmp_path_factory.mktemp("int8")
    options = {"quantization": "int8", "representative_data": data, "batch_size": 1}
    return tflite(model, folder / "net.tflite", verify=False, **options)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_header_tells_a_program_in_cpp_what_it_must_know(quantized, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    c_array(quantized, tmp_path / "net.h", name="net")
    (tmp_path / "main.cc").write_text(textwrap.dedent(RESOLVER))
    flags = ["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run(["c++", *flags, "main.cc", "-o", "main"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    interpreter = Interpreter(model_path=str(quantized))
    scaling = []
    for details in (*interpreter.get_input_details(), *interpreter.get_output_details()):
        scale, zero_point = details["quantization"]
        scaling += [f"{np.float32(scale):.9g}", str(zero_point)]
    words = done.stdout.split()
    assert words[:10] == ["1", "1", "36", "5", "1", "6", "6", "1", "1", "5"]
    assert words[10:14] == scaling
    assert sorted(words[14:18]) == ["conv", "fc", "pool", "reshape"]
    assert words[18:20] == ["1", "0"]  # all added, and no room left
    assert words[20:] == [*words[14:17], "0"]  # one too many for the small one


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_headers_of_two_networks_go_into_one_program_without_a_warning(file, quantized, tmp_path):
    c_array(file, tmp_path / "first.h", name="first")
    c_array(quantized, tmp_path / "second.h", name="second")
    (tmp_path / "main.c").write_text(
        '#include "first.h"\n#include "second.h"\n#include "first.h"\n'
        "int main(void) { return first[0] + second[0] + second_input_0_zero_point; }\n"
    )
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run(["cc", *flags, "-c", "main.c"], cwd=tmp_path, check=True)
    text = (tmp_path / "first.h").read_text()
    assert "#ifndef FIRST_H_" in text
    assert "first_input_0_scale" not in text  # float32: there is nothing to scale


def test_operator_that_tflite_micro_lacks_is_named(tmp_path):
    x = keras.Input((4,), name="x")
    net = tflite(keras.Model(x, keras.ops.sign(x)), tmp_path / "n.tflite", verify=False)
    with pytest.warns(UserWarning, match="TensorFlow Lite Micro has no SIGN"):
        text = c_array(net, tmp_path / "net.h", name="net").read_text()
    assert "/* TensorFlow Lite Micro has no SIGN. */" in text
    assert "net_add_operators" not in text


def test_free_size_besides_the_batch_is_refused(tmp_path):
    x = keras.Input((None, 4), name="x")
    net = tflite(keras.Model(x, keras.ops.abs(x)), tmp_path / "n.tflite", verify=False)
    with pytest.raises(ExportError, match="Input 'x' has a free size besides the batch"):
        c_array(net, tmp_path / "net.h")


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
    for name in ("my-net", "7up", "int", "class", ""):
        with pytest.raises(InvalidArgumentError, match=f"name={name!r}"):
            c_array(file, tmp_path / "net.h", name=name)
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
