"""The benchmark measures the written files, and lists what could not be written."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError
from tf_kfacprune.export import benchmark, benchmarking, tflite_files

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 12)).astype("float32")


def net(units):
    keras.utils.set_random_seed(0)
    x = keras.Input((12,), name="x")
    return keras.Model(x, keras.layers.Dense(3)(keras.layers.Dense(units, "relu")(x)))


@pytest.fixture(scope="module")
def models():
    return {"dense": net(256), "compact": net(16)}


@pytest.fixture(scope="module")
def measured(models):
    labels = models["dense"].predict(X, verbose=0).argmax(axis=1)
    return benchmark(
        models,
        quantizations=(None, "int8"),
        representative_data=X,
        data=(X, labels),
        blocks=3,
    )


def test_every_model_is_measured_in_every_format(measured):
    assert [(row.model, row.quantization) for row in measured.rows] == [
        ("dense", None),
        ("dense", "int8"),
        ("compact", None),
        ("compact", "int8"),
    ]
    assert measured.rows[0].ratio == 1.0
    assert measured.failures == ()


def test_sizes_and_accuracy_are_those_of_the_files(measured):
    dense, dense_int8, compact, _ = measured.rows
    assert dense.size.raw > dense_int8.size.raw
    assert dense.size.raw > compact.size.raw
    assert dense.accuracy == 1.0
    assert dense_int8.accuracy >= 0.9
    assert compact.accuracy < 1.0


def test_table_has_a_line_for_each_file(measured):
    lines = str(measured).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:5] == ["model", "format", "threads", "bytes", "gzip"]
    assert lines[1].split()[:3] == ["dense", "float32", "1"]
    assert lines[1].endswith("100.00 %")
    assert len({len(line) for line in lines}) == 1


def test_macs_and_memory_are_those_of_the_models(measured):
    dense, _, compact, _ = measured.rows
    assert (dense.macs, compact.macs) == (12 * 256 + 256 * 3, 12 * 16 + 16 * 3)
    assert compact.macs_ratio == 16 / 256
    assert compact.time_per_macs == pytest.approx(compact.ratio * 16)
    assert dense.activations >= 4 * 256
    assert dense.memory is None or dense.memory > 0


def test_plain_values_can_be_written_as_json(measured):
    rows = json.loads(json.dumps(measured.to_dict()))["rows"]
    assert rows[0]["size"]["raw"] == measured.rows[0].size.raw
    assert rows[0]["time_per_macs"] == 1.0


def test_every_number_of_threads_has_a_reference_of_its_own(models):
    result = benchmark(models, quantizations=(None,), threads=(1, 2), blocks=1)
    assert [(row.model, row.threads) for row in result.rows] == [
        ("dense", 1),
        ("compact", 1),
        ("dense", 2),
        ("compact", 2),
    ]
    assert [row.ratio for row in result.rows[::2]] == [1.0, 1.0]


def test_format_that_fails_is_listed_and_the_rest_is_measured(models, monkeypatch):
    def fail_float16(model, path, *, quantization, **options):
        if quantization == "float16":
            raise ExportError("The TFLite converter cannot do it")
        return original(model, path, quantization=quantization, verify=False, **options)

    original = benchmarking.tflite
    monkeypatch.setattr(benchmarking, "tflite", fail_float16)
    result = benchmark({"net": models["compact"]}, quantizations=(None, "float16"), blocks=1)
    assert [row.quantization for row in result.rows] == [None]
    assert "failed: net as float16: The TFLite converter cannot do it" in str(result)
    assert "-" in str(result).splitlines()[1]
    with pytest.raises(ExportError, match="cannot do it"):
        benchmark({"net": models["compact"]}, quantizations=("float16",))


def test_failures_name_no_folder_of_this_machine(models, monkeypatch):
    """They go into records."""

    def nan_in_the_second(file, inputs, *, what):
        found = original(file, inputs, what=what)
        return {name: y * np.nan for name, y in found.items()} if "1.tflite" in what else found

    original = tflite_files.run_litert
    monkeypatch.setattr(tflite_files, "run_litert", nan_in_the_second)
    result = benchmark({"net": models["compact"]}, quantizations=(None, "float16"), blocks=1)
    assert result.failures == (
        "net as float16: The file for 1.tflite returns NaN or infinite values at 'output'.",
    )


def test_nothing_to_measure_and_bad_data_are_refused(models):
    with pytest.raises(InvalidArgumentError, match="at least one model"):
        benchmark({})
    with pytest.raises(InvalidArgumentError, match="one number of threads"):
        benchmark(models, threads=())
    with pytest.raises(InvalidArgumentError, match=r"pair \(x, y\)"):
        benchmark(models, data=X)
    with pytest.raises(DataError, match="Found 49 labels"):
        benchmark(models, quantizations=(None,), data=(X, np.zeros(49)), blocks=1)
