"""A file says what it is, and stays the same network."""

from __future__ import annotations

import struct

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export import Metadata, Port, read_metadata, run_tflite, tflite
from tf_kfacprune.export.metadata import ENTRY
from tf_kfacprune.export.model_file import add_entry, read_entries

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(30, 6, 6, 1)).astype("float32")
FULL = Metadata(
    labels=["Katze", "Hund", "Äffchen"],
    scale=1 / 255,
    offset=-0.5,
    pruning={"budget": {"macs": 0.1}, "layers": {"conv": {"channels": 9, "kept": [0, 2, 5]}}},
)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 6, 1), name="image")
    x = keras.layers.Flatten()(keras.layers.Conv2D(3, 3, activation="relu", name="conv")(image))
    return keras.Model(image, keras.layers.Dense(3, name="fc")(x))


@pytest.mark.parametrize("quantization", [None, "float16", "int8"])
def test_metadata_comes_back_and_the_outputs_are_the_same(model, tmp_path, quantization):
    options = {"quantization": quantization}
    if quantization == "int8":
        options["representative_data"] = X
    plain = tflite(model, tmp_path / "plain.tflite", **options)
    described = tflite(model, tmp_path / "described.tflite", metadata=FULL, **options)
    assert read_metadata(plain) is None
    found = read_metadata(described)
    assert (found.labels, found.scale, found.offset) == (FULL.labels, FULL.scale, FULL.offset)
    assert found.pruning == FULL.pruning
    assert found.version == kp.__version__
    assert found.inputs == (Port("image", "image", 0),)
    assert found.outputs == (Port("fc", "output", 0),)
    np.testing.assert_array_equal(run_tflite(described, X), run_tflite(plain, X))
    assert described.stat().st_size - plain.stat().st_size < 700


def test_old_content_is_untouched_and_aligned(model, tmp_path):
    """Weights must lie at multiples of 16 bytes, as microcontrollers need them."""
    content = tflite(model, tmp_path / "net.tflite", verify=False).read_bytes()
    longer = add_entry(content, "name", b"value")
    assert longer.endswith(content)
    assert (len(longer) - len(content)) % 16 == 0
    before = read_entries(content)
    assert read_entries(longer) == before | {"name": b"value"}
    assert read_entries(add_entry(longer, "other", b"")) == before | {
        "name": b"value",
        "other": b"",
    }


def test_official_reader_finds_the_entry(model, tmp_path):
    from tensorflow.lite.python import schema_py_generated as schema

    file = tflite(model, tmp_path / "net.tflite", verify=False, metadata=FULL)
    root = schema.Model.GetRootAsModel(file.read_bytes(), 0)
    entries = {
        root.Metadata(i).Name(): root.Buffers(root.Metadata(i).Buffer()).DataAsNumpy().tobytes()
        for i in range(root.MetadataLength())
    }
    assert entries[ENTRY.encode()] == read_entries(file.read_bytes())[ENTRY]
    assert root.Version() == 3
    assert root.SubgraphsLength() == 1
    assert root.SignatureDefs(0).SignatureKey() == b"serving_default"


def test_c_array_of_a_described_file_is_the_same_content(model, tmp_path):
    file = tflite(model, tmp_path / "net.tflite", batch_size=1, metadata=FULL)
    text = kp.export.c_array(file, tmp_path / "net.h").read_text()
    assert f"model_len = {file.stat().st_size} " in text


def test_pruning_record_of_a_compact_model(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((4,), name="x")
    hidden = keras.layers.Dense(8, activation="relu", name="fc1")(x)
    pm = kp.PrunableModel(
        keras.Model(x, keras.layers.Dense(2, name="fc2")(hidden)), budget=kp.Budget(macs=0.5)
    )
    with pytest.warns(UserWarning, match="is not on its budget"):
        small = kp.compact(pm)
    metadata = Metadata.of(pm, small, labels=["no", "yes"])
    assert metadata.pruning == {
        "budget": {"asked": {"macs": 0.5}, "achieved": {"params": 1.0, "macs": 1.0}},
        "kept_neurons": {"x": list(range(4)), "fc1": list(range(8)), "fc2": [0, 1]},
        "dense": {"neurons": {"x": 4, "fc1": 8, "fc2": 2}, "params": 58, "macs": 48},
        "compact": {"neurons": {"x": 4, "fc1": 8, "fc2": 2}, "params": 58, "macs": 48},
    }


def test_record_of_a_run_is_cut_down_to_what_a_file_should_say():
    record = {
        "seed": 0,
        "budget": {"asked": {"macs": 0.5}, "achieved": {"macs": 0.25}},
        "dense": {"neurons": {"fc": 4}, "params": 20, "macs": 16, "accuracy": 0.5},
        "compact": {"neurons": {"fc": 1}, "params": 5, "macs": 4, "latency_us": 3.0},
        "kept_neurons": {"fc": [2]},
        "versions": {"keras": "3"},
    }
    metadata = Metadata.of_record(record, labels=["no", "yes"], scale=0.5)
    assert (metadata.labels, metadata.scale, metadata.offset) == (("no", "yes"), 0.5, 0.0)
    assert metadata.pruning == {
        "budget": record["budget"],
        "kept_neurons": record["kept_neurons"],
        "versions": record["versions"],
        "dense": {"neurons": {"fc": 4}, "params": 20, "macs": 16},
        "compact": {"neurons": {"fc": 1}, "params": 5, "macs": 4},
    }
    del record["kept_neurons"]
    with pytest.raises(InvalidArgumentError, match="has no 'kept_neurons'"):
        Metadata.of_record(record)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"labels": "cat"}, "list of strings"),
        ({"labels": [1, 2]}, "list of strings"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"offset": "0"}, "offset must be a finite number"),
        ({"pruning": {"kept": {1, 2}}}, "plain values"),
        ({"pruning": {"loss": float("inf")}}, "plain values"),
    ],
)
def test_metadata_that_cannot_be_written_is_refused(arguments, said):
    with pytest.raises(InvalidArgumentError, match=said):
        Metadata(**arguments)


def test_files_that_are_none_are_refused(model, tmp_path):
    with pytest.raises(ExportError, match="no such file"):
        read_metadata(tmp_path / "none.tflite")
    other = tmp_path / "other.tflite"
    other.write_bytes(b"PK" * 20)
    with pytest.raises(ExportError, match="identifier is missing"):
        read_metadata(other)
    content = tflite(model, tmp_path / "net.tflite", verify=False).read_bytes()
    other.write_bytes(content[:40])
    with pytest.raises(ExportError, match=r"other\.tflite: its metadata cannot be read"):
        read_metadata(other)
    with pytest.raises(ExportError, match="already"):
        add_entry(add_entry(content, "name", b"1"), "name", b"2")


def test_newer_schema_is_refused(model, tmp_path):
    content = bytearray(tflite(model, tmp_path / "net.tflite", verify=False).read_bytes())
    root = struct.unpack_from("<I", content)[0]
    (field,) = struct.unpack_from("<H", content, root - struct.unpack_from("<i", content, root)[0])
    longer = add_entry(bytes(content), "name", b"1")
    changed = bytearray(longer)
    struct.pack_into("<H", changed, 8, 4 + 2 * 9)  # one field more than the schema has
    assert field <= 4 + 2 * 8
    with pytest.raises(ExportError, match="newer schema"):
        add_entry(bytes(changed), "other", b"1")
