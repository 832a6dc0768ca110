"""Reads array files (``.npz``, JPEG ``.npz``, IDX) and says what is wrong with them."""

from __future__ import annotations

import gzip
import itertools
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tf_kfacprune.errors import DataError

__all__ = ["KEYS", "decode_jpeg_arrays", "read_idx", "read_npz"]

KEYS = ("x_train", "y_train", "x_test", "y_test")

# Magic numbers of the IDX format for unsigned bytes: 0x0000_08_<number of dimensions>.
_IDX_UNSIGNED_BYTE = 0x0800

# Images decoded per call: bounds the memory of the decoded batch.
_DECODE_BATCH = 5_000


def read_npz(path: Path, keys: Sequence[str] = KEYS) -> dict[str, np.ndarray]:
    """Reads the arrays ``keys`` of an ``.npz`` file.

    Raises:
        DataError: if the file is missing, not a complete ``.npz``, lacks a key, or holds Python
            objects (which could run code when read).
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected an .npz with {', '.join(keys)}.")
    try:
        # An open stream, not the path: numpy leaves the file open when the archive is damaged.
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(
                    f"{path}: must be an .npz archive, found a single array. Save it with "
                    f"numpy.savez(path, {', '.join(f'{k}={k}' for k in keys)})."
                )
            with archive:
                missing = [key for key in keys if key not in archive]
                if missing:
                    raise DataError(
                        f"{path}: key {missing[0]!r} is missing. Expected {', '.join(keys)}; "
                        f"found {', '.join(archive.files) or 'nothing'}."
                    )
                return {key: _read_member(archive, key, path) for key in keys}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a readable .npz file ({error}). It may be truncated: fetch or save it "
            "again."
        ) from error


def _read_member(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    """One array of the archive; members are decoded only here, so damage shows only here."""
    try:
        return np.asarray(archive[key])
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}: {key!r} holds Python objects, expected a plain array. Save numbers "
                "with a numeric dtype and text with .astype('U')."
            ) from error
        raise DataError(
            f"{path}: {key!r} cannot be read ({error}). The file may be damaged: fetch or save "
            "it again."
        ) from error


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzip-compressed IDX file of unsigned bytes (the MNIST family's own format).

    Raises:
        DataError: if the file is missing, truncated or not in this format.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        with gzip.open(path, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}). Fetch it again.") from error
    magic = int.from_bytes(content[:4], "big")
    rank = magic & 0xFF
    if len(content) < 4 or magic >> 8 != _IDX_UNSIGNED_BYTE >> 8 or rank == 0:
        raise DataError(f"{path}: not an IDX file of unsigned bytes (starts with {magic:#010x}).")
    start = 4 + 4 * rank
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").astype(int))
    if len(shape) != rank or len(content) - start != int(np.prod(shape)):
        raise DataError(
            f"{path}: the header promises shape {shape}, but {max(len(content) - start, 0)} bytes "
            "follow. The file is damaged: fetch it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def decode_jpeg_arrays(
    stream: np.ndarray, offsets: np.ndarray, *, shape: tuple[int, int, int], where: str
) -> np.ndarray:
    """Decodes concatenated JPEG files.

    Args:
        stream: uint8, all files one after another.
        offsets: int64, shape ``(n + 1,)``; image i is ``stream[offsets[i]:offsets[i + 1]]``.
        shape: height, width and channels that every image must have.
        where: file and key, for messages.

    Returns:
        uint8 images, shape ``(n, *shape)``.

    Raises:
        DataError: if the offsets do not fit the stream, or an image does not decode to ``shape``.
    """
    if (
        stream.dtype != np.uint8
        or stream.ndim != 1
        or offsets.ndim != 1
        or len(offsets) < 2
        or not np.issubdtype(offsets.dtype, np.integer)
        or offsets[0] < 0
        or offsets[-1] > len(stream)
        or np.any(np.diff(offsets) <= 0)
    ):
        raise DataError(
            f"{where}: offsets must be rising integers inside the JPEG bytes. Found "
            f"{offsets.dtype} offsets of shape {offsets.shape} for {stream.dtype} bytes of shape "
            f"{stream.shape}."
        )
    import tensorflow as tf

    content = stream.tobytes()
    files = [content[begin:end] for begin, end in itertools.pairwise(offsets)]

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
    def decode(batch: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(
            lambda file: tf.ensure_shape(tf.io.decode_jpeg(file, channels=shape[2]), shape),
            batch,
            fn_output_signature=tf.TensorSpec(shape, tf.uint8),
        )

    images = np.empty((len(files), *shape), dtype=np.uint8)
    for start in range(0, len(files), _DECODE_BATCH):
        batch = files[start : start + _DECODE_BATCH]
        try:
            images[start : start + len(batch)] = decode(tf.constant(batch)).numpy()
        except tf.errors.InvalidArgumentError as error:
            # The error of a batch does not say which image: decode one by one to name it.
            for i, file in enumerate(batch, start):
                _check_jpeg(file, shape, f"{where}: image {i}")
            raise DataError(f"{where}: cannot be decoded ({error.message}).") from error
    return images


def _check_jpeg(file: bytes, shape: tuple[int, int, int], where: str) -> None:
    """Raises a `DataError` that says why one JPEG does not decode to ``shape``."""
    import tensorflow as tf

    try:
        found = tuple(tf.io.decode_jpeg(file, channels=shape[2]).shape)
    except tf.errors.InvalidArgumentError as error:
        raise DataError(f"{where} is not a readable JPEG.") from error
    if found != shape:
        raise DataError(f"{where} must have shape {shape}. Found {found}.")
