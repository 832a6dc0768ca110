"""The state of a training, kept so that a killed process costs a minute and not the run.

`keras.callbacks.BackupAndRestore` writes and reads the state: weights, optimizer, phases and noise
in one file, the number of the epoch in another. What a kill leaves of its saving in place:

| killed | with `double_checkpoint` alone |
| --- | --- |
| while weights are written | a file that cannot be read, beside the previous one |
| between the two files | weights that have seen an epoch more than they are said to have |
| while the number is written | a file that is no JSON, at which every start fails |
| in the middle of an epoch | the state at its beginning |

Here Keras writes every state into a new folder, which then takes the place of the old one at once:
a kill leaves the old state whole, or the new one. The files of the old state stay in the new folder
under the names that `double_checkpoint` gives them, in case the new ones cannot be read any more.
States are saved in the middle of epochs, too.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import keras

from tf_kfacprune.cli.batches import EpochBatches
from tf_kfacprune.cli.stopping import Stopping
from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.atomic import atomic_directory

__all__ = ["Backup", "progress"]

# Keras' names.
_WEIGHTS, _POSITION = "latest.weights.h5", "training_metadata.json"
# Upper bounds of what an array takes in a file of HDF5, in bytes.
_HEADER, _ELEMENT = 4096, {"float64": 8, "int64": 8, "uint64": 8}  # others take 4 at most
# Saving takes a twentieth of the time at most.
_TIMES_AS_LONG = 20


class Backup(keras.callbacks.BackupAndRestore):
    """Saves the state now and then, restores it at the start, and stops on request.

    A state is saved after the first step, so that a full disk is noticed then, and again whenever
    twenty times as long has passed as the last one took. A state that cannot be saved is no reason
    to end a training: a warning says so.

    Args:
        folder: Where the state is kept.
        batches: The data, which go on in the middle of an epoch.
        stopping: Signals, which are put off from the first step on until the state is saved.
    """

    def __init__(self, folder: Path, batches: EpochBatches, stopping: Stopping) -> None:
        super().__init__(str(folder), double_checkpoint=True, delete_checkpoint=False)
        self._folder = folder
        self._batches = batches
        self._stopping = stopping
        self._epoch = 0
        self._due = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        try:
            super().on_train_begin(logs)  # weights and epoch
            position = _position(self._folder)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidArgumentError(
                f"{self._folder}: the state of the interrupted run cannot be restored: "
                f"{type(error).__name__}: {error}. If the model or this library has changed since, "
                "start anew with --overwrite."
            ) from error
        if position is not None:
            self._batches.start = position["batch"]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._first = epoch, self._batches.start

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._stopping.deferred = True
        done = self._first + batch + 1
        if done < self._batches.steps:  # the last one ends with its epoch
            self._save_if_due(self._epoch, done)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._save_if_due(epoch + 1, 0)

    def on_train_end(self, logs: Any = None) -> None:
        self._stopping.deferred = False

    def _save_if_due(self, epoch: int, batch: int) -> None:
        begin = time.monotonic()
        if begin < self._due and not self._stopping.is_asked_for:
            return
        try:
            self._save(epoch, batch)
        except (ExportError, OSError, RuntimeError) as error:  # the last is what HDF5 raises
            self._say_that_it_failed(error)
        end = time.monotonic()
        self._due = end + _TIMES_AS_LONG * (end - begin)
        self._stopping.check()

    def _save(self, epoch: int, batch: int) -> None:
        position = {
            "epoch": epoch,
            "epochs": self.params["epochs"],
            "batch": batch,
            "batches": self._batches.steps,
        }
        with atomic_directory(self._folder, marker=_POSITION, overwrite=True) as folder:
            _ask_for_room(folder / _WEIGHTS, self.model)
            writer = keras.callbacks.BackupAndRestore(str(folder))
            writer.set_model(self.model)
            writer.on_epoch_end(epoch - 1)  # the run goes on with the one after
            (folder / _POSITION).write_text(json.dumps(position))  # Keras reads the epoch of it
            for name in (_WEIGHTS, _POSITION):
                if (self._folder / name).is_file():
                    _link_or_copy(self._folder / name, folder / f"{name}.bkp")

    def _say_that_it_failed(self, error: Exception) -> None:
        kept = progress(self._folder)
        warnings.warn(
            f"The state of the training cannot be saved: {error} Training goes on; "
            + (f"the last state, after {kept}, is kept." if kept else "no state is kept yet."),
            stacklevel=2,
        )


def progress(folder: Path) -> str | None:
    """How far the state in a folder has come, in words; None if there is none."""
    position = _position(folder)
    if position is None:
        return None
    done = f"{position['epoch']} of {position['epochs']} epochs"
    if not position["batch"]:
        return done
    return f"{done} and {position['batch']} of {position['batches']} steps of the next"


def _position(folder: Path) -> dict[str, int] | None:
    path = folder / _POSITION
    return json.loads(path.read_text()) if path.is_file() else None


def _ask_for_room(file: Path, model: keras.Model) -> None:
    """Raises an `OSError` if there is no room for the state.

    HDF5 must not find that out: closing a file that could not be written, it ends the process
    with a segmentation fault sooner or later.
    """
    size = _HEADER + sum(
        _HEADER + math.prod(v.shape) * _ELEMENT.get(v.dtype, 4)
        for v in {id(v): v for v in [*model.variables, *model.optimizer.variables]}.values()
    )
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
        elif shutil.disk_usage(file.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file.unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
