"""What is kept of a training run beside its output until the output is complete.

| in `<output_dir>.resume` | what it is |
| --- | --- |
| `lock` | held by the run; a second one on the same output is refused |
| `run.json` | flags of the run, checksums of its data and its model, versions |
| `latency_table.json` | times of the layers, which a budget of latency was translated with |
| `dense`, `pruned` | the last state of a training (`backup.py`) |
| `dense.keras`, `model.keras` | trained models |
"""

from __future__ import annotations

import filecmp
import json
import shlex
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import keras
import numpy as np
from absl import flags

from tf_kfacprune.cli.backup import progress
from tf_kfacprune.cli.command import UsageError
from tf_kfacprune.cli.locking import LockedFolder
from tf_kfacprune.data import Dataset
from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.atomic import check_directory, followed
from tf_kfacprune.reporting import versions, write_json_atomic

__all__ = ["DENSE", "MODEL", "RECORD", "KeptRun"]

DENSE, MODEL, RECORD = "dense.keras", "model.keras", "record.json"
_RUN = "run.json"
# Not of the run, but of the one call.
_OF_THE_CALL = {"output_dir", "resume", "debug", "help"}
# A given value wins over that of the interrupted run; the data are compared by their content.
_FREE = _OF_THE_CALL | {"data", "data_dir", "import", "overwrite"}


class KeptRun:
    """A run on one output folder, from its lock to its end; use it in a `with`.

    An error or a signal leaves what has been trained, and says how to go on.

    Args:
        values: The parsed flags. In a run that is resumed, those that were not given take the
            values of the interrupted run.

    Attributes:
        folder: Where everything is kept.
        is_resumed: Whether there is something to go on from.

    Raises:
        ExportError: If the output may not be replaced, another run is writing it, or an
            interrupted one is kept and the flags do not say what to do with it.
        UsageError: If a flag differs from that of the interrupted run.
    """

    def __init__(self, values: flags.FlagValues) -> None:
        self._values = values
        if not values.resume:
            self.check_output()
        target = followed(values.output_dir)
        if not target.name:
            raise ExportError(f"--output_dir={values.output_dir} is not a name for a new folder.")
        self.folder = target.with_name(f"{target.name}.resume")
        self._lock = LockedFolder(
            self.folder, f"--output_dir={values.output_dir} is taken by another run"
        )
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        values, contents = self._values, self._lock.contents()
        has_run = (self.folder / _RUN).is_file()
        if not has_run and any(not path.name.startswith(".") for path in contents):
            raise ExportError(
                f"{self.folder} is needed for the state of the run, and holds something else: "
                f"{contents[0].name}. Move it away, or choose another --output_dir."
            )
        self._stored: dict[str, Any] = {}
        if values.resume and has_run:
            self._stored = self._read()
            self._take_over_flags()
        elif self._kept() and not values.resume and not values.overwrite:
            raise ExportError(
                f"{self.folder} holds an interrupted run: {self._kept()} Go on with --resume, or "
                "discard it with --overwrite."
            )
        else:
            self._discard()
        self.is_resumed = self._kept() is not None

    def check_output(self) -> None:
        """Refuses an output that may not be replaced.

        Raises:
            ExportError: If there is one.
        """
        values = self._values
        check_directory(values.output_dir, marker=RECORD, overwrite=values.overwrite)

    @property
    def is_complete(self) -> bool:
        """Whether the output was written already, and only the kept state is left over."""
        ours, theirs = self.folder / MODEL, followed(self._values.output_dir) / MODEL
        is_whole = (theirs.parent / RECORD).is_file() and ours.is_file() and theirs.is_file()
        return is_whole and filecmp.cmp(ours, theirs, shallow=False)

    def begin(self, dataset: Dataset) -> None:
        """Notes what is trained on what, or compares it with the interrupted run.

        Args:
            dataset: The data.

        Raises:
            InvalidArgumentError: If the data or the model are not those of the interrupted run.
        """
        values = self._values
        content = {
            "flags": {n: values[n].value for n in values if n not in _OF_THE_CALL},
            "data": _checksum(dataset),
            "model": None,
            "versions": versions(),
        }
        if values.model.endswith(".keras"):
            content["model"] = zlib.crc32(Path(values.model).read_bytes())
        for name in ("data", "model"):
            if self._stored.get(name, content[name]) != content[name]:
                raise InvalidArgumentError(
                    f"--{name}={values[name].value}: not what the interrupted run in {self.folder} "
                    "was trained on; the file has changed. Restore it, or start anew with "
                    "--overwrite."
                )
        if self._stored.get("versions", content["versions"]) != content["versions"]:
            warnings.warn(
                "The interrupted run had other versions of Python or its packages: the result may "
                f"differ from that of an undisturbed run. Then: {self._stored['versions']}. Now: "
                f"{content['versions']}.",
                stacklevel=2,
            )
        if not self._stored:
            write_json_atomic(self.folder / _RUN, content, overwrite=True)

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """A Keras object that is made once in a run, however often the run is resumed."""
        file = self.folder / f"{name}.json"
        if file.is_file():
            return keras.saving.deserialize_keras_object(json.loads(file.read_text()))
        made = make()
        write_json_atomic(file, keras.saving.serialize_keras_object(made))
        return made

    def command(self) -> list[str]:
        """The command that makes this run from its beginning."""
        values = self._values
        own = (values[n] for n in values if n not in _OF_THE_CALL - {"output_dir"})
        given = [flag.serialize() for flag in own if flag.value != flag.default]
        return ["kfacprune", "train", *given]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = None if error is None else self._kept()
        if error is not None and kept is not None:
            output = shlex.quote(self._values.output_dir)
            error.add_note(f"{kept} Go on with: kfacprune train --resume --output_dir={output}")
        if kept is None:
            self._discard()
        self._lock.release()

    def _kept(self) -> str | None:
        """What is kept, in words; None if it is nothing that took long."""
        if (self.folder / MODEL).is_file():
            return f"The trained model is kept in {self.folder / MODEL}."
        for name in ("pruned", "dense"):
            if (done := progress(self.folder / name)) is not None:
                return f"The training of the {name} network, {done}, is kept in {self.folder}."
        if (self.folder / DENSE).is_file():
            return f"The trained dense network is kept in {self.folder}."
        return None

    def _discard(self) -> None:
        for path in self._lock.contents():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _read(self) -> dict[str, Any]:
        file = self.folder / _RUN
        try:
            stored = json.loads(file.read_text())
            return {name: stored[name] for name in ("flags", "data", "model", "versions")}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidArgumentError(
                f"{file}: the interrupted run cannot be read ({type(error).__name__}: {error}). "
                "Start anew with --overwrite."
            ) from error

    def _take_over_flags(self) -> None:
        for name, stored in self._stored["flags"].items():
            if name not in self._values:  # of another version, which `begin` tells
                continue
            flag = self._values[name]
            if not flag.present:
                flag.value = stored
            elif name not in _FREE and flag.value != stored:
                raise UsageError(
                    f"{flag.serialize()}: the interrupted run in {self.folder} was started with "
                    f"--{name}={stored}. Leave the flag out to go on with it, or start anew with "
                    "--overwrite and without --resume."
                )


def _checksum(dataset: Dataset) -> int:
    check = 0
    for array in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        check = zlib.crc32(np.ascontiguousarray(array).data, check)
    return check
