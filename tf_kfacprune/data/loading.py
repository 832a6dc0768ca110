"""Finds a data set by name or path: a folder the user names, the system, or Keras' download."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from tf_kfacprune.data.dataset import Dataset, checked_dataset
from tf_kfacprune.data.files import decode_jpeg_arrays, read_idx, read_npz
from tf_kfacprune.errors import DataError

__all__ = ["NAMES", "load"]

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")

_DIGITS = tuple("0123456789")
_LABELS = {
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
}

# Where the Debian package dataset-fashion-mnist puts its files.
_SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_IDX_FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}
_JPEG_KEYS = (
    *("jpeg_train", "offsets_train", "y_train"),
    *("jpeg_test", "offsets_test", "y_test"),
)


def load(
    name_or_path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    kind: str | None = "classes",
) -> Dataset:
    """Loads a labelled data set.

    Args:
        name_or_path: ``"digits"`` (8 x 8 images inside scikit-learn: offline), ``"mnist"``,
            ``"fashion_mnist"``, ``"cifar10"``, or the path of an ``.npz`` file with ``x_train``,
            ``y_train``, ``x_test`` and ``y_test``. In such a file uint8 inputs are images (scaled
            to [0, 1]; a channel axis is added if missing) and floating-point inputs are taken as
            they are; classes are integers from 0 up, or names as text.
        data_dir: folder with ``mnist.npz``, ``fashion_mnist.npz`` or its four ``idx.gz`` files,
            ``cifar10.npz`` or ``cifar10_jpeg.npz``. With a folder nothing is ever downloaded;
            without one, Keras downloads what the system does not have.
        kind: what the labels of an ``.npz`` file are: ``"classes"``; ``"binary"``, one or several
            decisions of 0 or 1 for each example; ``"values"``, one or several numbers for each
            example; or None for what they look like. All named data sets have classes.

    Returns:
        The data set: float32 inputs; int64 classes or float32 labels of another kind; training
        order as stored.

    Raises:
        InvalidArgumentError: if ``kind`` is unknown.
        DataError: if the data set is unknown, missing, incomplete or malformed; the message names
            the file, the array, what was found and the remedy.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.data.load("digits")
        Dataset(name='digits', train=1437, test=360, input_shape=(8, 8, 1), num_classes=10)
    """
    name = os.fspath(name_or_path)
    if name.endswith(".npz"):
        arrays = read_npz(Path(name))
        return checked_dataset(arrays, name=Path(name).stem, source=name, kind=kind)
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise DataError(
            f"Unknown data set {name!r}."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Expected one of {', '.join(NAMES)}, or the path of an .npz file with x_train, "
            "y_train, x_test and y_test."
        )
    if kind not in (None, "classes"):
        raise DataError(
            f"Data set {name!r} has classes. Received: kind={kind!r}. Other kinds of labels are "
            "read from .npz files of your own."
        )
    if name == "digits":
        return _load_digits()
    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(f"data_dir: no such folder: {os.fspath(data_dir)}.")
    folder = None if data_dir is None else Path(data_dir)
    arrays, source = _FINDERS[name](folder)
    dataset = checked_dataset(arrays, name=name, source=source, num_classes=10)
    return replace(dataset, labels=_LABELS[name])


def _load_digits() -> Dataset:
    """1,797 digits of 8 x 8 pixels; one example in five is for the test, stratified, seed 0."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "Data set 'digits' comes with scikit-learn, which is not installed. Install it with "
            "pip install 'tf_kfacprune[examples]', or choose another data set."
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16.0).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    dataset = checked_dataset(arrays, name="digits", source="digits", num_classes=10)
    return replace(dataset, scale=1 / 16, labels=_LABELS["digits"])


Found = tuple[dict[str, np.ndarray], str]


def _find_mnist(folder: Path | None) -> Found:
    if folder is None:
        return _download("mnist")
    path = folder / "mnist.npz"
    return read_npz(path), str(path)


def _find_fashion_mnist(folder: Path | None) -> Found:
    if folder is not None and (folder / "fashion_mnist.npz").is_file():
        path = folder / "fashion_mnist.npz"
        return read_npz(path), str(path)
    # The Debian package is a fallback for a folder too: it is on this machine, not a download.
    for place in [folder, _SYSTEM_FASHION_MNIST]:
        if place is not None and (place / _IDX_FILES["x_train"]).is_file():
            arrays = {key: read_idx(place / file) for key, file in _IDX_FILES.items()}
            return arrays, str(place)
    if folder is None:
        return _download("fashion_mnist")
    raise DataError(
        f"{folder}: no Fashion-MNIST here. Expected fashion_mnist.npz, or "
        f"{', '.join(_IDX_FILES.values())}. Leave data_dir out to download it."
    )


def _find_cifar10(folder: Path | None) -> Found:
    if folder is None:
        return _download("cifar10")
    path = folder / "cifar10.npz"
    if path.is_file():
        return read_npz(path), str(path)
    path = folder / "cifar10_jpeg.npz"
    if not path.is_file():
        raise DataError(
            f"{folder}: no CIFAR-10 here. Expected cifar10.npz (x_train, y_train, x_test, y_test) "
            "or cifar10_jpeg.npz. Leave data_dir out to download it."
        )
    stored = read_npz(path, _JPEG_KEYS)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = decode_jpeg_arrays(
            stored[f"jpeg_{part}"],
            stored[f"offsets_{part}"],
            shape=(32, 32, 3),
            where=f"{path}: 'jpeg_{part}'",
        )
        arrays[f"y_{part}"] = stored[f"y_{part}"]
    return arrays, str(path)


_FINDERS: dict[str, Callable[[Path | None], Found]] = {
    "mnist": _find_mnist,
    "fashion_mnist": _find_fashion_mnist,
    "cifar10": _find_cifar10,
}


def _download(name: str) -> Found:
    """Keras' own download, kept in its cache."""
    import keras

    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises a plain Exception when a URL cannot be fetched.
        raise DataError(
            f"Data set {name!r} is not on this machine and Keras could not download it ({error}). "
            "Put its files into a folder and name the folder with data_dir, or use 'digits', "
            "which needs no download."
        ) from error
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    return arrays, f"{name} (Keras download)"
