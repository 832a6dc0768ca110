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


def test_an_unknown_class_is_named(tmp_path):
    class Twice(keras.layers.Layer):
        def call(self, x):
            return 2.0 * x

    inputs = keras.Input((3,))
    keras.Model(inputs, Twice()(inputs)).save(tmp_path / "net.keras")
    with pytest.raises(InvalidArgumentError, match=r"class 'Twice'\. Decorate it .* --import"):
        load_keras(tmp_path / "net.keras")


def test_missing_file_and_foreign_file_are_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no such file"):
        load_keras(tmp_path / "net.keras")
    (tmp_path / "net.h5").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match=r"ends in \.keras"):
        load_keras(tmp_path / "net.h5")


def repacked(source, target, changes=(), compression=zipfile.ZIP_DEFLATED):
    """A copy of an archive, packed, with some members replaced or added."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", compression, compresslevel=1) as new,
    ):
        contents = {name: old.read(name) for name in old.namelist()} | dict(changes)
        for name, content in contents.items():
            new.writestr(name, content)
    return target


def config_with(saved, padding):
    with zipfile.ZipFile(saved) as archive:
        return archive.read("config.json") + b" " * padding


def test_packed_archive_with_a_model_is_read(model, saved, tmp_path):
    """Spaces are valid JSON: 60 MB of them are strange, but not too many."""
    content = config_with(saved, 60 * 2**20)
    path = repacked(saved, tmp_path / "packed.keras", {"config.json": content})
    assert path.stat().st_size < 10**6
    x = np.ones((2, 3), "float32")
    np.testing.assert_array_equal(load_keras(path)(x), model(x))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_padding_in_the_config_is_refused_before_it_is_read(
    saved, tmp_path, monkeypatch, compression
):
    content = config_with(saved, 65 * 2**20)
    path = repacked(saved, tmp_path / "bomb.keras", {"config.json": content}, compression)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # a member that is read is an error
    said = rf"bomb\.keras: member 'config\.json' unpacks to {len(content):,} bytes"
    with pytest.raises(InvalidArgumentError, match=said):
        load_keras(path)


def test_many_small_bombs_are_one(saved, tmp_path):
    """Each may be; all together unpack to 90 MB more than packing explains."""
    changes = {f"assets/{i}.txt": b" " * (31 * 2**20) for i in range(3)}
    path = repacked(saved, tmp_path / "bomb.keras", changes)
    with pytest.raises(InvalidArgumentError, match=r"\d members unpack to 9\d,\d+,\d+ bytes"):
        load_keras(path)


def test_weights_of_zeros_may_be_packed_small(saved, tmp_path):
    """40 MB of zeros, as a pruned network has them, take up a thousandth."""
    from tf_kfacprune.export.archives import refuse_bomb

    changes = {"model.weights.h5": bytes(40 * 2**20)}
    refuse_bomb(repacked(saved, tmp_path / "zeros.keras", changes))


def test_damaged_directory_is_named(saved):
    content = bytearray(saved.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start : start + 4] = b"KPKP"
    saved.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=r"net\.keras: the directory of this archive"):
        load_keras(saved)
