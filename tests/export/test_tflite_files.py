"""The .tflite file in every format: small, equal to the model, or refused."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export import run_tflite, running, tflite, tflite_files
from tf_kfacprune.gates import NeuronGate

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(40, 8, 8, 1)).astype("float32")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(image)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.MaxPooling2D()(keras.layers.ReLU()(x))
    x = keras.layers.Dense(64, activation="relu")(keras.layers.Flatten()(x))
    net = keras.Model(image, keras.layers.Dense(5)(x))
    net.layers[2].moving_mean.assign(RNG.normal(size=8) * 0.1)
    return net


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tflite")
    written = {}
    for quantization in (None, "float16", "dynamic", "int8", "int16x8"):
        data = X if quantization in ("int8", "int16x8") else None
        written[quantization] = tflite(
            model,
            folder / f"{quantization}.tflite",
            quantization=quantization,
            representative_data=data,
        )
    return written


@pytest.mark.parametrize(
    ("quantization", "worst"),
    [(None, 1e-5), ("float16", 2e-3), ("dynamic", 0.02), ("int8", 0.05), ("int16x8", 0.02)],
)
def test_file_computes_the_models_outputs(model, files, quantization, worst):
    reference = keras.ops.convert_to_numpy(model(X))
    found = run_tflite(files[quantization], X)
    assert found.shape == reference.shape
    error = np.sqrt(np.mean((found - reference) ** 2) / np.mean(reference**2))
    assert error <= worst
    assert quantization is None or error > 0.0


def test_every_quantization_makes_the_file_smaller(model, files):
    sizes = {quantization: file.stat().st_size for quantization, file in files.items()}
    assert 4 * model.count_params() < sizes[None] < 4 * model.count_params() + 6_000
    assert sizes["float16"] < 0.65 * sizes[None]
    assert sizes["dynamic"] < 0.45 * sizes[None]
    assert sizes["int8"] < 0.45 * sizes[None]


def test_full_integer_file_has_integer_inputs_and_outputs(files):
    from ai_edge_litert.interpreter import Interpreter

    for quantization, dtype in [("int8", np.int8), ("int16x8", np.int16), ("float16", np.float32)]:
        runner = Interpreter(model_path=str(files[quantization])).get_signature_runner()
        details = [*runner.get_input_details().values(), *runner.get_output_details().values()]
        assert {d["dtype"] for d in details} == {dtype}


def test_io_dtype_is_chosen(model, tmp_path):
    path = tflite(
        model,
        tmp_path / "net.tflite",
        quantization="int8",
        representative_data=iter([X[:20], X[20:]]),
        io_dtype="uint8",
    )
    from ai_edge_litert.interpreter import Interpreter

    (details,) = (
        Interpreter(model_path=str(path)).get_signature_runner().get_input_details().values()
    )
    assert details["dtype"] == np.uint8


def test_signature_has_stable_names(files):
    from ai_edge_litert.interpreter import Interpreter

    signatures = Interpreter(model_path=str(files[None])).get_signature_list()
    assert signatures == {"serving_default": {"inputs": ["image"], "outputs": ["output"]}}


@pytest.mark.slow
def test_any_batch_size_runs_and_a_fixed_one_needs_no_shape_arithmetic(model, files, tmp_path):
    fixed = tflite(model, tmp_path / "net.tflite", batch_size=1)
    reference = keras.ops.convert_to_numpy(model(X[:3]))
    for file in [fixed, files[None]]:
        np.testing.assert_allclose(run_tflite(file, X[:3]), reference, rtol=1e-4, atol=1e-6)
    assert operations(files[None]) - operations(fixed) >= {"SHAPE", "PACK"}


def operations(file):
    from ai_edge_litert.interpreter import Interpreter

    return {op["op_name"] for op in Interpreter(model_path=str(file))._get_ops_details()}


def test_several_inputs_and_outputs_are_matched_by_name(tmp_path):
    keras.utils.set_random_seed(1)
    z, a = keras.Input((3,), name="z"), keras.Input((3,), name="a")
    h = keras.layers.Subtract()([z, a])  # not symmetric: a swap is seen
    model = keras.Model([z, a], {"low": keras.layers.Dense(2)(h), "high": h})
    path = tflite(model, tmp_path / "net.tflite")
    named = {"z": np.full((4, 3), 5.0, "float32"), "a": np.ones((4, 3), "float32")}
    outputs = run_tflite(path, named)
    assert outputs["low"].shape == (4, 2)
    np.testing.assert_allclose(outputs["high"], 4.0)


def test_verification_runs_without_tensorflow(files, tmp_path):
    """The worker itself fails if TensorFlow is imported; make sure that it would see it."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['tensorflow'] = sys\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    job = tmp_path / "job.json"
    job.write_text(
        f'{{"file": "{files[None]}", "threads": 1, "batch_size": 8, "inputs": ["image"]}}'
    )
    np.savez(tmp_path / "inputs.npz", X)
    command = [sys.executable, "-P", running._WORKERS / running._LITERT, "run", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "TensorFlow was imported" in done.stderr


def damaged(content):
    """The file with its largest weights changed: still loads and runs, computes another net."""
    changed = np.frombuffer(content, np.uint8).copy()
    middle = len(changed) // 2 & ~3
    changed[middle : middle + 400].view("float32")[:] = 1.0
    return changed.tobytes()


def test_changed_weights_are_found_and_nothing_is_left(model, tmp_path, monkeypatch):
    original = tflite_files.convert
    monkeypatch.setattr(tflite_files, "convert", lambda *a, **k: damaged(original(*a, **k)))
    with pytest.raises(ExportError, match=r"net\.tflite does not agree with the Keras model"):
        tflite(model, tmp_path / "net.tflite")
    assert os.listdir(tmp_path) == []
    old = tmp_path / "old.tflite"
    old.write_bytes(b"old")
    with pytest.raises(ExportError, match="does not agree"):
        tflite(model, old, overwrite=True)
    assert old.read_bytes() == b"old"
    tflite(model, old, overwrite=True, verify=False)
    assert len(old.read_bytes()) > 1000


def test_truncated_file_is_found(model, files, tmp_path, monkeypatch):
    half = tmp_path / "half.tflite"
    half.write_bytes(files[None].read_bytes()[:500])
    with pytest.raises(ExportError, match=r"half\.tflite cannot be run"):
        run_tflite(half, X)
    monkeypatch.setattr(tflite_files, "convert", lambda *args, **options: half.read_bytes())
    with pytest.raises(ExportError, match=r"The file for \S+/net\.tflite cannot be run"):
        tflite(model, tmp_path / "net.tflite")
    assert os.listdir(tmp_path) == ["half.tflite"]
    with pytest.raises(ExportError, match="no such file"):
        run_tflite(tmp_path / "none.tflite", X)


def test_wrong_input_name_is_found(files):
    told = r"inputs \['image'\]. Received: arrays for \['picture'\]"
    with pytest.raises(ExportError, match=told):
        run_tflite(files[None], {"picture": X})


def test_existing_file_is_refused(model, files):
    before = files[None].read_bytes()
    with pytest.raises(ExportError, match="already exists"):
        tflite(model, files[None])
    assert files[None].read_bytes() == before


def test_error_inside_the_converter_leaves_nothing_and_shows_its_log(model, tmp_path, monkeypatch):
    import tensorflow as tf

    def fail(self):
        os.write(2, b"loc(fused): 'tf.Strange' op is neither a custom op nor a flex op\n")
        raise RuntimeError("Could not translate MLIR to FlatBuffer.\nmore")

    monkeypatch.setattr(tf.lite.TFLiteConverter, "from_saved_model", lambda path: Broken(fail))
    with pytest.raises(ExportError, match="Could not translate MLIR") as caught:
        tflite(model, tmp_path / "net.tflite")
    assert "'tf.Strange' op" in str(caught.value)
    assert os.listdir(tmp_path) == []


class Broken:
    def __init__(self, fail):
        self.convert = lambda: fail(self)


def test_labels_let_the_accuracy_decide(model, tmp_path, monkeypatch):
    labels = model.predict(X, verbose=0).argmax(axis=1)
    tflite(model, tmp_path / "net.tflite", verify_data=(X, labels), max_accuracy_drop=0.0)
    original = tflite_files.run_litert

    def one_class_only(file, inputs, what):
        (output,) = original(file, inputs, what=what).values()
        output[:, 0] += 100.0
        return {"output": output}

    monkeypatch.setattr(tflite_files, "run_litert", one_class_only)
    with pytest.raises(ExportError, match=r"loses too much accuracy.*log is kept in"):
        tflite(model, tmp_path / "bad.tflite", verify_data=(X, labels), tolerance=1e9, batch_size=1)
    assert os.listdir(tmp_path) == ["net.tflite"]
    with pytest.raises(InvalidArgumentError, match="max_accuracy_drop must be"):
        tflite(model, tmp_path / "bad.tflite", max_accuracy_drop=2)


def test_unwritable_folder_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file/net\.tflite cannot be written"):
        tflite(model, tmp_path / "file" / "net.tflite")


def test_dynamic_range_leaves_small_tensors_in_float(model, files):
    """The kernel of 64 x 5 has 320 elements, that of 128 x 64 has 8,192."""
    from ai_edge_litert.interpreter import Interpreter

    found = {
        tuple(details["shape"]): details["dtype"]
        for details in Interpreter(model_path=str(files["dynamic"])).get_tensor_details()
    }
    assert found[5, 64] == np.float32
    assert found[64, 128] == np.int8


def test_interrupt_during_conversion_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tflite_files, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tflite(model, tmp_path / "net.tflite")
    assert os.listdir(tmp_path) == []


def test_converter_is_silent(model, tmp_path, capfd):
    tflite(model, tmp_path / "net.tflite", verify=False)
    assert capfd.readouterr() == ("", "")


def test_operation_without_a_builtin_is_refused_by_name(tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, keras.ops.erfinv(keras.ops.tanh(x)))
    with pytest.raises(ExportError, match="Erfinv"):
        tflite(model, tmp_path / "net.tflite")
    assert os.listdir(tmp_path) == []


def test_operation_that_only_tensorflow_has_must_be_asked_for(tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, keras.ops.sinh(x))
    path = tmp_path / "net.tflite"
    with pytest.raises(ExportError, match="pass select_ops=True"):
        tflite(model, path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(InvalidArgumentError, match="Pass verify=False"):
        tflite(model, path, select_ops=True)
    tflite(model, path, select_ops=True, verify=False)
    with pytest.raises(ExportError, match=r"cannot be run[^/]*RuntimeError: Select TensorFlow op"):
        run_tflite(path, X[:, 0, :4, 0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "int3"}, r"one of \(None, 'float16'.*'int3'"),
        ({"quantization": "int8"}, "needs representative_data"),
        ({"quantization": "dynamic", "representative_data": X}, "Leave it out"),
        ({"io_dtype": "int8"}, r"io_dtype must be one of \('float32',\)"),
        (
            {"quantization": "int8", "representative_data": X, "io_dtype": "int16"},
            r"\('int8', 'uint8', 'float32'\)",
        ),
        ({"tolerance": 0.0}, "positive number"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_that_mean_nothing_are_refused(model, tmp_path, options, said):
    with pytest.raises(InvalidArgumentError, match=said):
        tflite(model, tmp_path / "net.tflite", **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (X[0], r"shape \('n', 8, 8, 1\)"),
        (X[:0], "empty"),
        (X * np.nan, "NaN"),
        ({"picture": X}, "'image'"),
    ],
)
@pytest.mark.parametrize("argument", ["representative_data", "verify_data"])
def test_bad_data_is_refused_by_argument(model, tmp_path, data, said, argument):
    options = {"quantization": "int8", "representative_data": X} | {argument: data}
    with pytest.raises(DataError, match=said) as caught:
        tflite(model, tmp_path / "net.tflite", **options)
    assert argument in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_gated_model_is_refused(tmp_path):
    x = keras.Input((3,))
    gated = keras.Model(x, keras.layers.Dense(2)(NeuronGate()(x)))
    with pytest.raises(UnsupportedModelError, match="compact"):
        tflite(gated, tmp_path / "net.tflite")


def test_a_network_that_overflows_is_refused_before_the_converter_crashes(tmp_path):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, kernel_initializer=keras.initializers.Constant(1e30))(inputs)
    x = keras.layers.Dense(2, kernel_initializer=keras.initializers.Constant(1e30))(x)
    path = tmp_path / "net.tflite"
    with pytest.raises(ExportError, match=r"infinite values.*representative_data"):
        tflite(
            keras.Model(inputs, x),
            path,
            quantization="int8",
            representative_data=np.ones((3, 4), "float32"),
            verify=False,
        )
    assert not path.exists()


def test_rolled_recurrence_is_refused_in_full_integer_before_the_converter_crashes(tmp_path):
    x = keras.Input((4, 3))
    model = keras.Model(x, keras.layers.Bidirectional(keras.layers.GRU(2, name="gru"))(x))
    data = np.zeros((2, 4, 3), "float32")
    with pytest.raises(UnsupportedModelError, match="unroll=True"):
        tflite(model, tmp_path / "n.tflite", quantization="int8", representative_data=data)


def test_rolled_recurrence_needs_a_fixed_batch(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 3))
    model = keras.Model(x, keras.layers.LSTM(2, name="lstm")(x))
    with pytest.raises(InvalidArgumentError, match=r"'lstm' \(LSTM\).*batch_size=1"):
        tflite(model, tmp_path / "net.tflite")
    tflite(model, tmp_path / "net.tflite", batch_size=1)


def test_unrolled_recurrence_converts_in_full_integer(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 3))
    model = keras.Model(x, keras.layers.LSTM(4, unroll=True)(x))
    data = RNG.normal(size=(30, 4, 3)).astype("float32")
    path = tflite(model, tmp_path / "net.tflite", quantization="int8", representative_data=data)
    assert path.stat().st_size > 0
