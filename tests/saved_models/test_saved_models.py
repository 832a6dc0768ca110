"""The committed models do what their records say, in every format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp

FOLDERS = sorted(
    path.parent for path in Path(__file__).parents[2].glob("saved_models/*/record.json")
)


def predictions_of(folder: Path, name: str, x: np.ndarray) -> np.ndarray:
    if name == "saved_model":
        served = tf.saved_model.load(folder / name).signatures["serving_default"]
        (argument,) = served.structured_input_signature[1]
        (output,) = served(**{argument: tf.constant(x)}).values()
        return output.numpy()
    if name == "compact.tflite":
        return kp.export.run_tflite(folder / name, x)
    return kp.export.load_keras(folder / name).predict(x, verbose=0)


def test_there_is_a_committed_model():
    assert [folder.name for folder in FOLDERS] == ["digits"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ["compact.keras", "compact.tflite", "saved_model"])
def test_accuracy_is_that_of_the_record(folder, name):
    record = json.loads((folder / "record.json").read_text())
    data = kp.data.load(record["data"])
    predicted = predictions_of(folder, name, data.x_test).argmax(axis=1)
    right = int(np.sum(predicted == data.y_test))
    # another processor may round differently: one example may change sides
    assert abs(right - record["compact"]["accuracy"] * len(data.y_test)) <= 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_layers_have_the_sizes_of_the_record(folder):
    record = json.loads((folder / "record.json").read_text())
    model = kp.export.load_keras(folder / "compact.keras")
    assert model.count_params() == record["compact"]["params"]
    assert kp.inspect(model).macs == record["compact"]["macs"]
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            assert layer.kernel.shape[-1] == len(record["kept_neurons"][layer.name])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_file_says_what_it_is(folder):
    record = json.loads((folder / "record.json").read_text())
    data = kp.data.load(record["data"])
    metadata = kp.export.read_metadata(folder / "compact.tflite")
    assert metadata == dataclasses.replace(
        kp.export.Metadata.of_record(record, labels=data.labels, scale=data.scale),
        version=metadata.version,
    )
    said = (folder / "compact.tflite").stat().st_size - record["compact"]["tflite"]["raw"]
    assert 0 < said < 3000  # the record gives the size without metadata


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_record_keeps_the_promise_of_the_demo(folder):
    """At most 15 % of the dense MACs at no more than 1 point below the dense accuracy."""
    record = json.loads((folder / "record.json").read_text())
    assert record["budget"]["achieved"]["macs"] <= 0.15
    assert record["compact"]["accuracy"] >= record["dense"]["accuracy"] - 0.01
    assert "examples/digits_quickstart.py" in record["command"]
    assert record["seed"] is not None
