"""The .keras file: written whole, and refused clearly when damaged."""

from __future__ import annotations

import os
import zipfile

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export import keras_file, load_keras


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


@pytest.fixture
def saved(model, tmp_path):
    return keras_file(model, tmp_path / "net.keras")


def test_round_trip(model, saved):
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(load_keras(saved)(x), model(x))
    assert os.listdir(saved.parent) == ["net.keras"]


def test_existing_file_and_other_suffix_are_refused(model, saved):
    with pytest.raises(ExportError, match="already exists"):
        keras_file(model, saved)
    keras_file(model, saved, overwrite=True)
    with pytest.raises(ExportError, match=r"must end in \.keras"):
        keras_file(model, saved.with_suffix(".h5"))


def test_failure_while_saving_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()

    def half(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save", half)
    with pytest.raises(ExportError, match=r"net\.keras cannot be written: No space left"):
        keras_file(model, saved, overwrite=True)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["net.keras"]


@pytest.mark.parametrize("kept", [0, 100, -10])
def test_truncated_file_is_named(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(InvalidArgumentError, match=r"net\.keras: not a complete \.keras file"):
        load_keras(saved)


def test_archive_without_a_model_is_named(saved):
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("letter.txt", "dear")
    with pytest.raises(InvalidArgumentError, match=r"net\.keras: Keras cannot load this model"):
        load_keras(saved)


def test_missing_file_and_foreign_file_are_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no such file"):
        load_keras(tmp_path / "net.keras")
    (tmp_path / "net.h5").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match=r"ends in \.keras"):
        load_keras(tmp_path / "net.h5")
