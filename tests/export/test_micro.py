"""Files on TensorFlow Lite Micro itself: outputs, the arena really used, operations it lacks."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError
from tf_kfacprune.export import arena_bytes, check_micro, tflite, with_head
from tf_kfacprune.export.arena import estimated_arena
from tf_kfacprune.export.memory_plan import lifetimes, planned_bytes, with_memory_plan
from tf_kfacprune.export.model_graph import read_graph

needs_micro = pytest.mark.skipif(
    importlib.util.find_spec("tflite_micro") is None, reason="needs pip install tflite-micro"
)

RUN_IN = """
import sys
from tflite_micro.python.tflite_micro import runtime
runtime.Interpreter.from_file(sys.argv[1], arena_size=int(sys.argv[2]))
"""


def residual():
    """Two residual blocks: of 2048 values each, at most three activations live at a time."""
    x = inputs = keras.Input((16, 16, 2), name="x")
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    for _ in range(2):
        y = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
        x = layers.Add()([x, layers.Conv2D(8, 3, padding="same")(y)])
    x = layers.DepthwiseConv2D(3, strides=2, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


def wide():
    """Dense layers of so many units that preparing one takes more memory than the activations."""
    x = keras.Input((20,), name="x")
    return keras.Model(x, layers.Dense(300)(layers.Dense(10, activation="relu")(x)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(model, inputs, file) by name and format."""
    folder, found = tmp_path_factory.mktemp("micro"), {}
    for name, build in (("residual", residual), ("wide", wide)):
        model = build()
        x = np.random.default_rng(0).normal(size=(24, *model.input_shape[1:])).astype("float32")
        for quantization in (None, "int8"):
            options = {"representative_data": x} if quantization else {}
            path = folder / f"{name}_{quantization}.tflite"
            tflite(model, path, quantization=quantization, batch_size=1, **options)
            found[name, quantization] = (model, x, path)
    return found


files = pytest.mark.parametrize(
    "key", [(name, q) for name in ("residual", "wide") for q in (None, "int8")]
)


@needs_micro
@files
def test_outputs_are_the_models_and_the_arena_is_enough_and_estimated_right(written, key):
    model, x, path = written[key]
    found = check_micro(path, model, x, max_examples=4)  # in an arena of the size it reports
    assert found.runs
    assert found.verification.examples == 4
    assert found.verification.error < (1e-4 if key[1] is None else 0.1)
    assert found.flash_bytes == path.stat().st_size
    assert found.arena_bytes >= found.activation_bytes + found.record_bytes
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.arena_bytes = 0
    estimate = estimated_arena(path.read_bytes())
    assert estimate.activations == found.activation_bytes == planned_bytes(path.read_bytes())
    assert abs(estimate.records - found.record_bytes) <= 32
    assert 0.95 <= estimate.bytes / found.arena_bytes <= 1.05


@needs_micro
@pytest.mark.parametrize("name", ["residual", "wide"])
def test_a_smaller_arena_would_not_do(written, name):
    """Nor, for the wide one, do activations and records alone: preparing it takes more."""
    _, _, path = written[name, "int8"]

    def runs_in(size):
        command = [sys.executable, "-c", RUN_IN, path, str(int(size))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    needed = arena_bytes(path)
    assert runs_in(needed)
    estimate = estimated_arena(path.read_bytes())
    held = estimate.activations + estimate.records
    assert not runs_in(0.97 * held // 16 * 16)
    assert (needed > 1.2 * held) == (name == "wide")


@needs_micro
@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", kp.zoo.NAMES)
def test_the_estimate_holds_for_every_network_of_the_zoo(tmp_path, name, quantization):
    model = kp.zoo.build(name, seed=0)
    x = np.random.default_rng(0).random((16, *model.input_shape[1:])).astype("float32")
    options = {"representative_data": x} if quantization else {}
    path = tmp_path / "net.tflite"
    tflite(model, path, quantization=quantization, batch_size=1, verify=False, **options)
    found = check_micro(path)  # outputs of an untrained network, quantized, are nearly constant
    assert 0.99 <= estimated_arena(path.read_bytes()).bytes / found.arena_bytes <= 1.01


def test_the_plan_in_the_file_reaches_the_peak(written):
    """The runtime's own plan takes four activations of 16 x 16 x 8 values, the file's three."""
    _, _, path = written["residual", "int8"]
    living = lifetimes(read_graph(path.read_bytes()))
    assert living.peak == planned_bytes(path.read_bytes()) == 3 * 2048
    own = sorted(living.sizes, key=lambda i: (-living.sizes[i], -i))
    assert living.height(living.placed(own)) == 4 * 2048
    assert with_memory_plan(path.read_bytes()) == path.read_bytes()


def test_no_plan_is_written_where_it_saves_nothing_or_the_batch_is_free(written, tmp_path):
    model, _, path = written["wide", None]
    assert b"OfflineMemoryAllocation" not in path.read_bytes()
    model, _, path = written["residual", None]
    assert b"OfflineMemoryAllocation" in path.read_bytes()
    free = tflite(model, tmp_path / "free.tflite", verify=False)
    assert b"OfflineMemoryAllocation" not in free.read_bytes()


def test_tensors_that_live_together_never_overlap(written):
    _, _, path = written["residual", "int8"]
    living = lifetimes(read_graph(path.read_bytes()))
    for order in (sorted(living.sizes), sorted(living.sizes, reverse=True)):
        offsets = living.placed(order)
        for a in offsets:
            for b in offsets:
                together = living.first[a] <= living.last[b] and living.first[b] <= living.last[a]
                if a < b and together:
                    ends = offsets[a] + living.sizes[a], offsets[b] + living.sizes[b]
                    assert ends[0] <= offsets[b] or ends[1] <= offsets[a]


@needs_micro
def test_inputs_and_outputs_are_told_apart_by_name(tmp_path):
    a, b = keras.Input((3,), name="zebra"), keras.Input((3,), name="ape")
    model = keras.Model([a, b], [layers.Dense(2)(a), layers.Dense(2)(b)])
    path = tflite(model, tmp_path / "two.tflite", batch_size=1)
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=(5, 3)).astype("float32") for name in ("zebra", "ape")}
    assert check_micro(path, model, data).verification.error < 1e-5


@needs_micro
def test_another_model_is_noticed(written):
    _, x, path = written["residual", None]
    keras.utils.set_random_seed(77)
    with pytest.raises(ExportError, match=r"TensorFlow Lite Micro, does not agree") as raised:
        check_micro(path, residual(), x, max_examples=2)
    assert "Nothing was kept" not in str(raised.value)


@needs_micro
def test_all_operations_that_are_lacking_are_named(tmp_path):
    x = keras.Input((4, 4, 2), name="x")
    y = layers.Dense(4)(layers.Flatten()(keras.ops.tile(x, (1, 2, 2, 1))))
    model = with_head(keras.Model(x, y), "argmax")
    path = tflite(model, tmp_path / "lacking.tflite", batch_size=1, verify=False)
    found = check_micro(path, model, np.zeros((2, 4, 4, 2), "float32"))
    assert not found.runs
    assert found.lacking == ("TILE", "TOPK_V2")
    assert (found.arena_bytes, found.verification) == (0, None)
    with pytest.raises(ExportError, match="lacks TILE, TOPK_V2"):
        arena_bytes(path)


def test_without_the_package_the_extra_is_named_and_the_arena_estimated(written, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, _, path = written["residual", "int8"]
    with pytest.raises(ExportError, match=r"pip install 'tf_kfacprune\[micro\]'"):
        check_micro(path)
    assert arena_bytes(path) == estimated_arena(path.read_bytes()).bytes


def test_wrong_arguments_are_refused(written, tmp_path):
    model, x, path = written["wide", None]
    with pytest.raises(InvalidArgumentError, match="model only"):
        check_micro(path, model)
    with pytest.raises(InvalidArgumentError, match="data only"):
        check_micro(path, data=x)
    with pytest.raises(InvalidArgumentError, match="max_examples=0"):
        check_micro(path, model, x, max_examples=0)
    with pytest.raises(ExportError, match="no such file"):
        check_micro(tmp_path / "none.tflite")


@needs_micro
def test_data_and_files_that_do_not_fit_are_refused(written, tmp_path):
    model, x, path = written["wide", None]
    with pytest.raises(DataError):
        check_micro(path, model, x[:, :7])
    (tmp_path / "half.tflite").write_bytes(path.read_bytes()[:300])
    with pytest.raises(ExportError, match="damaged"):
        check_micro(tmp_path / "half.tflite")
