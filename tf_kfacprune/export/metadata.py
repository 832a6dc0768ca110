"""What a .tflite file says about itself: labels, input scaling, how it was pruned, what is where.

It is one entry of the file, ``TF_KFACPRUNE_METADATA``, in JSON: a program in any language that can
read a file's entries can read it. Interpreters ignore entries that they do not know.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import keras

from tf_kfacprune.compaction import compaction_report
from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.model_file import add_entry, read_entries
from tf_kfacprune.export.ports import Port, Ports

__all__ = ["ENTRY", "Metadata", "read_metadata", "with_metadata"]

ENTRY = "TF_KFACPRUNE_METADATA"

_RECORDED = ("budget", "kept_neurons", "versions")
_SIDES = ("dense", "compact")
_FIGURES = ("neurons", "params", "macs")
_PORTS = ("inputs", "outputs")


@dataclass(frozen=True)
class Metadata:
    """What a ``.tflite`` file says about itself.

    Attributes:
        labels: names of the classes, in the order of the outputs.
        scale: what raw inputs are to be multiplied with before they are given to the model.
        offset: what is to be added after that. With a scaling baked in by `with_head`, leave both.
        pruning: the pruning record: any values that JSON can hold.
        version: version of this package that wrote the file.
        inputs: which input of the file is which of the Keras model, in the order of the model;
            `tflite` fills it in.
        outputs: likewise.

    Raises:
        InvalidArgumentError: if a label is no string, a number is not finite, or the record cannot
            be written as JSON.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.export.Metadata(labels=["cat", "dog"], scale=1 / 255).labels
        ('cat', 'dog')
    """

    labels: Sequence[str] = ()
    scale: float = 1.0
    offset: float = 0.0
    pruning: Mapping[str, Any] | None = None
    version: str | None = None
    inputs: Sequence[Port] = ()
    outputs: Sequence[Port] = ()

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or not all(isinstance(name, str) for name in self.labels):
            raise InvalidArgumentError(
                f"labels must be a list of strings. Received: labels={self.labels!r}."
            )
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value):
                raise InvalidArgumentError(
                    f"{name} must be a finite number. Received: {name}={value!r}."
                )
            object.__setattr__(self, name, float(value))  # NumPy's are no JSON
        try:
            json.dumps(self.pruning, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"pruning must hold plain values, which JSON can hold: {error}."
            ) from error

    @classmethod
    def of(
        cls,
        model: Any,
        compact_model: keras.Model,
        *,
        labels: Sequence[str] = (),
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> Metadata:
        """Metadata with the pruning record of a compact model.

        Args:
            model: what `compact` was given, in the same state.
            compact_model: what it returned.
            labels: names of the classes.
            scale: factor of the raw inputs.
            offset: added after scaling.

        Returns:
            Metadata whose ``pruning`` holds what a run's record does: the ``budget`` ``asked`` and
            ``achieved``, the ``kept_neurons`` of every layer, and ``neurons``, ``params`` and
            ``macs`` of the ``dense`` and the ``compact`` model.

        Raises:
            InvalidArgumentError: if the two models do not belong together.
        """
        removed = compaction_report(model, compact_model)
        kept = {name: layer["kept"] for name, layer in removed["layers"].items()}
        neurons = {
            "dense": {name: layer["channels"] for name, layer in removed["layers"].items()},
            "compact": {name: len(indices) for name, indices in kept.items()},
        }
        costs = {measure: removed[measure] for measure in ("params", "macs")}
        achieved = {n: cost["compact"] / max(cost["dense"], 1) for n, cost in costs.items()}
        budget = getattr(model, "budget", None)
        record = {
            "budget": {"asked": budget.targets if budget else {}, "achieved": achieved},
            "kept_neurons": kept,
            **{
                side: {"neurons": neurons[side], **{n: cost[side] for n, cost in costs.items()}}
                for side in _SIDES
            },
        }
        return cls(labels, scale, offset, record)

    @classmethod
    def of_record(
        cls,
        record: Mapping[str, Any],
        *,
        labels: Sequence[str] = (),
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> Metadata:
        """Metadata with the pruning record of a run, from what its ``record.json`` holds.

        Args:
            record: what `tf_kfacprune.reporting.record` returned, or was read from its file.
            labels: names of the classes.
            scale: factor of the raw inputs.
            offset: added after scaling.

        Returns:
            Metadata whose ``pruning`` holds what that of `of` does, and the ``versions`` of the
            packages that trained the model.

        Raises:
            InvalidArgumentError: if it is no such record.
        """
        missing = [key for key in _RECORDED if key not in record]
        if missing:
            raise InvalidArgumentError(
                f"record must be the record of a training run. It has no {missing[0]!r}."
            )
        kept = {key: record[key] for key in _RECORDED}
        for side in _SIDES:
            figures = record.get(side, {})
            kept[side] = {name: figures[name] for name in _FIGURES if name in figures}
        return cls(labels, scale, offset, {key: value for key, value in kept.items() if value})


def with_metadata(content: bytes, metadata: Metadata, ports: Ports = ((), ())) -> bytes:
    """A ``.tflite`` file with the metadata in it; the version is that of this package.

    Args:
        content: the file.
        metadata: what to write, but for its version, inputs and outputs.
        ports: inputs and outputs.

    Returns:
        The content of the new file.

    Raises:
        ExportError: if the content is not that of a ``.tflite`` file, or has such metadata already.
    """
    described: dict[str, Any] = {"tf_kfacprune": _version()}
    if metadata.labels:
        described["labels"] = list(metadata.labels)
    if (metadata.scale, metadata.offset) != (1.0, 0.0):
        described["input"] = {"scale": metadata.scale, "offset": metadata.offset}
    if metadata.pruning is not None:
        described["pruning"] = dict(metadata.pruning)
    for side, listed in zip(_PORTS, ports, strict=True):
        if listed:
            described[side] = [asdict(port) for port in listed]
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False)
    return add_entry(content, ENTRY, text.encode())


def read_metadata(path: str | os.PathLike[str]) -> Metadata | None:
    """What a ``.tflite`` file says about itself.

    Args:
        path: the file.

    Returns:
        Its metadata; None if it was written without any.

    Raises:
        ExportError: if the file is missing or damaged.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.export.read_metadata("net.tflite").labels  # doctest: +SKIP
        ('cat', 'dog')
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"{file}: no such file.")
    try:
        text = read_entries(file.read_bytes()).get(ENTRY)
        if text is None:
            return None
        described = json.loads(text)
        scaling = described.get("input", {})
        return Metadata(
            labels=described.get("labels", ()),
            scale=scaling.get("scale", 1.0),
            offset=scaling.get("offset", 0.0),
            pruning=described.get("pruning"),
            version=described["tf_kfacprune"],
            **{
                side: tuple(
                    Port(str(port["keras"]), str(port["name"]), int(port["index"]))
                    for port in described.get(side, ())
                )
                for side in _PORTS
            },
        )
    except (ExportError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExportError(f"{file}: its metadata cannot be read: {error}") from error


def _version() -> str:
    # Imports point down: the door of the package, which knows, is above this file.
    return str(sys.modules[__name__.partition(".")[0]].__version__)
