"""Data sets: what is loaded, and what is said about files that are missing or wrong."""

from __future__ import annotations

import dataclasses
import gzip
import struct

import numpy as np
import pytest

from tf_kfacprune.data import NAMES, load, loading, validation_split
from tf_kfacprune.errors import DataError


def arrays(**changes):
    """A valid tiny image data set of 3 classes, with some arrays replaced or removed (None)."""
    rng = np.random.default_rng(0)
    content = {
        "x_train": rng.integers(0, 256, (12, 4, 4), dtype=np.uint8),
        "y_train": np.arange(12, dtype=np.uint8) % 3,
        "x_test": rng.integers(0, 256, (6, 4, 4), dtype=np.uint8),
        "y_test": np.arange(6, dtype=np.uint8) % 3,
    } | changes
    return {key: value for key, value in content.items() if value is not None}


@pytest.fixture
def save(tmp_path):
    def write(name="own.npz", **changes):
        path = tmp_path / name
        np.savez(path, **arrays(**changes))
        return path

    return write


def test_digits_are_stratified_scaled_and_the_same_every_time():
    first, second = load("digits"), load("digits")
    assert first.x_train.shape == (1437, 8, 8, 1)
    assert first.x_test.shape == (360, 8, 8, 1)
    assert first.x_train.dtype == np.float32
    assert first.x_train.min() == 0.0
    assert first.x_train.max() == 1.0
    assert (first.scale, first.labels) == (1 / 16, tuple("0123456789"))
    assert np.bincount(first.y_test, minlength=10).min() >= 34
    np.testing.assert_array_equal(first.x_test, second.x_test)
    np.testing.assert_array_equal(first.y_train, second.y_train)


def test_dataset_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("digits").name = "other"


def test_own_uint8_images_are_scaled_and_get_a_channel_axis(save):
    path = save()
    data = load(path)
    assert data.name == "own"
    assert data.num_classes == 3
    assert data.input_shape == (4, 4, 1)
    expected = arrays()["x_train"][..., None].astype(np.float32) / 255.0
    np.testing.assert_array_equal(data.x_train, expected)
    assert (data.scale, data.labels) == (1 / 255, ())
    assert data.y_train.dtype == np.int64


def test_own_float_inputs_are_taken_as_they_are(save):
    x_train, x_test = np.full((12, 5), 7.5), np.full((6, 5), -2.0, dtype=np.float16)
    data = load(str(save(x_train=x_train, x_test=x_test)))
    assert data.input_shape == (5,)
    assert data.x_train.dtype == np.float32
    assert data.x_train[0, 0] == 7.5
    assert data.x_test[0, 0] == -2.0
    assert data.scale == 1.0


def test_labels_in_a_column_are_flattened(save):
    data = load(save(y_train=np.arange(12)[:, None] % 3))
    np.testing.assert_array_equal(data.y_train, np.arange(12) % 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_test": None}, ["'y_test' is missing", "x_train, y_train, x_test"]),
        ({"x_train": np.zeros((12, 4, 4), np.int32)}, ["'x_train'", "int32", "astype('float32')"]),
        ({"x_train": np.zeros(12, np.uint8)}, ["'x_train'", "(12,)"]),
        ({"x_train": np.zeros((0, 4, 4), np.uint8)}, ["'x_train'", "(0, 4, 4)"]),
        ({"x_test": np.zeros((6, 5, 4), np.uint8)}, ["one shape", "(4, 4, 1)", "(5, 4, 1)"]),
        ({"y_train": np.arange(11) % 3}, ["'x_train' and 'y_train'", "12 inputs and 11 labels"]),
        ({"y_train": np.zeros(12)}, ["'y_train'", "float64", "astype('int64')"]),
        ({"y_train": np.eye(12, dtype=int)}, ["'y_train'", "(12, 12)", "argmax(axis=1)"]),
        ({"y_train": np.array([-1] + [0] * 11)}, ["'y_train'", "label -1 at index 0"]),
        ({"y_test": np.array([0, 1, 2, 3, 0, 1])}, ["'y_test'", "0 to 2", "label 3"]),
        ({"x_train": np.array([[np.nan]] + [[0.0]] * 11)}, ["NaN", "1 of 12", "index 0"]),
        ({"x_test": np.array([["a"]] * 6, dtype=object)}, ["'x_test'", "Python objects"]),
    ],
)
def test_malformed_file_is_named_with_key_finding_and_remedy(save, changes, said):
    path = save(**changes)
    with pytest.raises(DataError) as caught:
        load(path)
    for words in [str(path), *said]:
        assert words in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.npz: no such file"):
        load(tmp_path / "nothing.npz")


@pytest.mark.parametrize("kept", [0, 10, 300])
def test_truncated_file_is_reported_as_damaged(save, kept):
    path = save()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="truncated"):
        load(path)


def test_flipped_bytes_inside_an_array_are_reported_as_damaged(save):
    path = save()
    content = bytearray(path.read_bytes())
    middle = content.index(arrays()["x_train"].tobytes()[:32])
    content[middle] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"'x_train' cannot be read"):
        load(path)


def test_single_array_under_an_npz_name_is_refused(tmp_path):
    path = tmp_path / "one.npz"
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(DataError, match="found a single array"):
        load(path)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError, match="Did you mean 'mnist'"):
        load("mnits")
    with pytest.raises(DataError, match=", ".join(NAMES)):
        load("imagenet")


def test_named_sets_are_read_from_the_folder_and_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_download", lambda name: pytest.fail("downloaded"))
    monkeypatch.setattr(loading, "_SYSTEM_FASHION_MNIST", tmp_path / "absent")
    for name in ["mnist", "fashion_mnist", "cifar10"]:
        with pytest.raises(DataError, match=str(tmp_path)):
            load(name, tmp_path)
        np.savez(tmp_path / f"{name}.npz", **arrays())
        data = load(name, tmp_path)
        assert data.name == name
        assert data.num_classes == len(data.labels) == 10


def test_missing_data_dir_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load("mnist", tmp_path / "absent")


def test_labels_outside_the_ten_classes_of_mnist_are_refused(save, tmp_path):
    save("mnist.npz", y_train=np.full(12, 10))
    with pytest.raises(DataError, match=r"0 to 9.*label 10"):
        load("mnist", tmp_path)


def test_failed_download_says_what_to_do(monkeypatch):
    import keras

    def offline():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", offline)
    with pytest.raises(DataError, match=r"URL fetch failure.*data_dir.*'digits'"):
        load("mnist")


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


def test_fashion_mnist_is_read_from_idx_files(tmp_path):
    for key, file in loading._IDX_FILES.items():
        (tmp_path / file).write_bytes(idx(arrays()[key]))
    data = load("fashion_mnist", tmp_path)
    np.testing.assert_array_equal(data.y_test, arrays()["y_test"])
    np.testing.assert_allclose(data.x_test[..., 0] * 255, arrays()["x_test"], rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (idx(np.zeros((12, 4, 4), np.uint8))[:-12], "not a complete gzip file"),
        (b"plain", "not a complete gzip file"),
        (gzip.compress(b"\0\0\x0d\x01" + bytes(8)), "not an IDX file"),
        (gzip.compress(struct.pack(">HBBI", 0, 8, 1, 9) + bytes(5)), "5 bytes"),
    ],
    # gzip writes the time into its header, and an identifier must not change with it.
    ids=["cut off", "not gzip", "not idx", "too short"],
)
def test_damaged_idx_file_is_reported(tmp_path, content, said):
    for key, file in loading._IDX_FILES.items():
        (tmp_path / file).write_bytes(idx(arrays()[key]))
    (tmp_path / loading._IDX_FILES["x_train"]).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load("fashion_mnist", tmp_path)
    assert loading._IDX_FILES["x_train"] in str(caught.value)


@pytest.fixture(scope="module")
def jpeg_arrays():
    import tensorflow as tf

    images = np.full((4, 32, 32, 3), 128, np.uint8)
    images[1:3, :16] = 40
    files = [tf.io.encode_jpeg(image).numpy() for image in images]
    offsets = np.cumsum([0] + [len(file) for file in files])
    stream = np.frombuffer(b"".join(files), np.uint8)
    content = {f"jpeg_{p}": stream for p in ("train", "test")}
    content |= {f"offsets_{p}": offsets for p in ("train", "test")}
    return images, content | {f"y_{p}": np.arange(4, dtype=np.uint8) for p in ("train", "test")}


def test_jpeg_cifar10_is_decoded_in_order(tmp_path, jpeg_arrays):
    images, content = jpeg_arrays
    np.savez(tmp_path / "cifar10_jpeg.npz", **content)
    data = load("cifar10", tmp_path)
    # JPEG is lossy: flat areas come back within a few grey levels.
    np.testing.assert_allclose(data.x_train * 255, images, atol=8)
    np.testing.assert_array_equal(data.y_train, range(4))


def test_bad_jpeg_names_the_image(tmp_path, jpeg_arrays):
    import tensorflow as tf

    _, content = jpeg_arrays
    stream, offsets = content["jpeg_test"].copy(), content["offsets_test"]
    stream[offsets[2] : offsets[2] + 8] = 0
    np.savez(tmp_path / "cifar10_jpeg.npz", **content | {"jpeg_test": stream})
    with pytest.raises(DataError, match=r"'jpeg_test': image 2 is not a readable JPEG"):
        load("cifar10", tmp_path)
    small = np.frombuffer(tf.io.encode_jpeg(np.zeros((8, 8, 3), np.uint8)).numpy(), np.uint8)
    small_set = {"jpeg_train": small, "offsets_train": np.array([0, len(small)])}
    np.savez(tmp_path / "cifar10_jpeg.npz", **content | small_set | {"y_train": np.array([0])})
    with pytest.raises(DataError, match=r"image 0 must have shape \(32, 32, 3\).*\(8, 8, 3\)"):
        load("cifar10", tmp_path)


def test_jpeg_offsets_outside_the_stream_are_refused(tmp_path, jpeg_arrays):
    _, content = jpeg_arrays
    beyond = content["offsets_train"].copy()
    beyond[-1] += 1
    np.savez(tmp_path / "cifar10_jpeg.npz", **content | {"offsets_train": beyond})
    with pytest.raises(DataError, match="rising integers inside"):
        load("cifar10", tmp_path)


def test_validation_split_holds_out_the_last_training_examples():
    data = load("digits")
    tuning = validation_split(data, 200)
    np.testing.assert_array_equal(tuning.x_train, data.x_train[:-200])
    np.testing.assert_array_equal(tuning.y_test, data.y_train[-200:])
    assert "last 200" in tuning.name
    assert tuning.labels == data.labels


@pytest.mark.parametrize("count", [0, -1, 1437, 0.2, True])
def test_validation_split_refuses_to_leave_one_side_empty(count):
    with pytest.raises(DataError, match="from 1 to 1436"):
        validation_split(load("digits"), count)
