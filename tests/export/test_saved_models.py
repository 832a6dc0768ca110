"""The SavedModel: lean, named, independent of this package, and verified."""

from __future__ import annotations

import os

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import DataError, ExportError, UnsupportedModelError
from tf_kfacprune.export import saved_model, saved_models
from tf_kfacprune.export.running import run_saved_model


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 6, 1), name="image")
    x = keras.layers.Conv2D(4, 3, use_bias=False)(image)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Activation("relu")(x)
    x = keras.layers.Dropout(0.5)(x)
    x = keras.layers.Dense(200, activation="relu")(keras.layers.Flatten()(x))
    return keras.Model(image, keras.layers.Dense(3)(x))


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    return saved_model(model, tmp_path_factory.mktemp("saved") / "net")


def test_it_runs_without_this_package_under_stable_names(model, written):
    x = np.random.default_rng(1).normal(size=(5, 6, 6, 1)).astype("float32")
    outputs = run_saved_model(written, {"image": x})
    assert list(outputs) == ["output"]
    np.testing.assert_allclose(outputs["output"], model(x), rtol=1e-4, atol=1e-6)


def test_weights_are_stored_once(model, written):
    stored = sum(file.stat().st_size for file in (written / "variables").iterdir())
    weights = 4 * model.count_params()
    assert weights <= stored < 1.2 * weights


def test_nothing_but_the_folder_is_left(written):
    assert os.listdir(written.parent) == ["net"]
    assert (written / "saved_model.pb").is_file()


def test_existing_folder_is_refused_and_replaced_on_request(model, written):
    with pytest.raises(ExportError, match="already exists"):
        saved_model(model, written, verify=False)
    saved_model(model, written, overwrite=True, verify=False)
    assert os.listdir(written.parent) == ["net"]


def test_mismatch_raises_and_leaves_nothing(model, tmp_path, monkeypatch):
    def other_network(folder, inputs, what):
        assert (folder / "saved_model.pb").is_file()
        return {"output": np.ones((len(inputs["image"]), 3), "float32")}

    monkeypatch.setattr(saved_models, "run_saved_model", other_network)
    with pytest.raises(ExportError, match="does not agree with the Keras model"):
        saved_model(model, tmp_path / "deep" / "net")
    assert os.listdir(tmp_path) == []


def test_damaged_folder_cannot_be_run(written, tmp_path):
    (tmp_path / "saved_model.pb").write_bytes((written / "saved_model.pb").read_bytes()[:99])
    with pytest.raises(ExportError, match="cannot be run"):
        run_saved_model(tmp_path, {"image": np.zeros((1, 6, 6, 1), "float32")})


def test_bad_verification_data_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(DataError, match=r"verify_data.*'image'"):
        saved_model(model, tmp_path / "net", verify_data=np.zeros((4, 6, 6)))
    assert os.listdir(tmp_path) == []


def test_model_that_returns_nan_is_not_verifiable(tmp_path):
    x = keras.Input((3,))
    broken = keras.layers.Dense(2, name="broken")
    model = keras.Model(x, broken(x))
    broken.bias.assign([0.0, np.nan])
    with pytest.raises(ExportError, match="NaN or infinite values at 'output'"):
        saved_model(model, tmp_path / "net")
    assert os.listdir(tmp_path) == []


def test_labels_let_the_accuracy_decide_and_the_log_is_named(model, tmp_path, monkeypatch):
    x = np.random.default_rng(2).normal(size=(50, 6, 6, 1)).astype("float32")
    labels = model.predict(x, verbose=0).argmax(axis=1)
    saved_model(model, tmp_path / "net", verify_data=(x, labels), max_accuracy_drop=0.0)

    def one_class_only(folder, inputs, what):
        return {"output": 1e6 * np.eye(3, dtype="float32")[np.zeros(len(inputs["image"]), int)]}

    monkeypatch.setattr(saved_models, "run_saved_model", one_class_only)
    monkeypatch.setattr(saved_models, "compute_tolerance", lambda model: 1e9)
    with pytest.raises(ExportError, match=r"loses too much accuracy.*log is kept in \S+\.log"):
        saved_model(model, tmp_path / "bad", verify_data=(x, labels))
    assert os.listdir(tmp_path) == ["net"]


def test_unwritable_folder_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file/net cannot be written"):
        saved_model(model, tmp_path / "file" / "net")


def test_subclassed_model_is_refused(tmp_path):
    class Subclassed(keras.Model):
        pass

    with pytest.raises(UnsupportedModelError, match="no symbolic inputs"):
        saved_model(Subclassed(), tmp_path / "net")
