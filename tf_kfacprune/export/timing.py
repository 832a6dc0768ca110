"""Latency of .tflite files against each other, measured so that the machine's mood cancels.

All files run in one process, in short interleaved blocks. A block gives the median time of each
file, and the ratio of two files within one block is free of what changes between blocks (clock
rate, other processes); the figure reported is the median of these ratios.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export.conversion import convert
from tf_kfacprune.export.running import litert_job
from tf_kfacprune.export.serving import Signature, check_exportable
from tf_kfacprune.validation import is_count

__all__ = ["Latency", "latency"]

# A slow model gets fewer runs in a block, so that a block takes about this long.
_BLOCK_SECONDS = 0.1


@dataclass(frozen=True)
class Latency:
    """Times of one inference.

    Attributes:
        microseconds: name -> median over the blocks.
        ratios: name -> median over the blocks of time / time of ``baseline``.
        baseline: name of the model that the others are compared with.
        threads: number of threads.
        batch_size: examples in one inference.
    """

    microseconds: dict[str, float]
    ratios: dict[str, float]
    baseline: str
    threads: int
    batch_size: int

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {time:.1f} us, {self.ratios[name]:.3f} x {self.baseline}"
            for name, time in self.microseconds.items()
        )


def latency(
    models: Mapping[str, keras.Model | str | os.PathLike[str]],
    *,
    baseline: str | None = None,
    threads: int = 1,
    batch_size: int = 1,
    blocks: int = 30,
    runs: int = 50,
) -> Latency:
    """Measures how long LiteRT takes for one inference of each model, relative to a baseline.

    Args:
        models: name -> ``.tflite`` file, or a Keras model, which is converted to a float32 file
            of fixed batch size for the occasion.
        baseline: name of the model to compare with; by default the first.
        threads: number of threads.
        batch_size: examples in one inference, where the file leaves it free.
        blocks: number of interleaved blocks, each of up to ``runs`` inferences per model.
        runs: inferences in a block; fewer for models that take longer than 0.1 s for them.

    Returns:
        Median microseconds and ratios.

    Raises:
        InvalidArgumentError: if a count is not positive or the baseline is not among the models.
        ExportError: if a file is missing or LiteRT cannot run it.

    Examples:
        >>> import tf_kfacprune as kp
        >>> kp.export.latency({"dense": dense, "compact": small}).ratios  # doctest: +SKIP
        {'dense': 1.0, 'compact': 0.17}
    """
    counts = {"threads": threads, "batch_size": batch_size, "blocks": blocks, "runs": runs}
    for name, value in counts.items():
        if not is_count(value):
            raise InvalidArgumentError(
                f"{name} must be a positive integer. Received: {name}={value!r}."
            )
    if not models:
        raise InvalidArgumentError("models is empty. Pass at least one file or model to time.")
    names = list(models)
    reference = names[0] if baseline is None else baseline
    if reference not in models:
        raise InvalidArgumentError(
            f"baseline must be one of {names}. Received: baseline={baseline!r}."
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [
            _file(models[name], Path(folder) / f"{i}.tflite", batch_size, name)
            for i, name in enumerate(names)
        ]
        job = {"files": files, "block_seconds": _BLOCK_SECONDS, **counts}
        times = litert_job("time", job, what=", ".join(names))["microseconds"]
    ratios = times / times[:, [names.index(reference)]]
    return Latency(
        microseconds=dict(zip(names, np.median(times, axis=0).tolist(), strict=True)),
        ratios=dict(zip(names, np.median(ratios, axis=0).tolist(), strict=True)),
        baseline=reference,
        threads=threads,
        batch_size=batch_size,
    )


def _file(
    model: keras.Model | str | os.PathLike[str], temporary: Path, batch_size: int, name: str
) -> str:
    """Path of the file to time; a Keras model is converted to ``temporary``."""
    if isinstance(model, keras.Model):
        check_exportable(model, batch_size)
        temporary.write_bytes(convert(model, Signature.of(model, batch_size)))
        return os.fspath(temporary)
    if not isinstance(model, str | os.PathLike):
        raise InvalidArgumentError(
            f"models[{name!r}] must be a Keras model or the path of a .tflite file. Received: "
            f"{type(model).__name__}."
        )
    if not Path(model).is_file():
        raise ExportError(f"{os.fspath(model)}: no such file.")
    return os.fspath(model)
