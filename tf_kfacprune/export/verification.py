"""Runs a written file in a clean process and compares its outputs with the Keras model's.

| symbol | meaning |
| --- | --- |
| y | output of the Keras model, one output, all examples |
| y' | output of the file on the same inputs |

Float formats are held to the largest error, max|y' - y| / max|y|; integer formats, where single
values may saturate, to the root mean square error, rms(y' - y) / rms(y). The tolerances follow from
the rounding unit of the stored weights: errors of many layers add up to tens of units.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.samples import Named
from tf_kfacprune.export.serving import Signature, layers_within

__all__ = [
    "ONLY_INPUT",
    "TOLERANCES",
    "compare_outputs",
    "compute_tolerance",
    "finite_reference",
    "litert_job",
    "run_litert",
    "run_saved_model",
]

# Rounding units: float32 2^-24, float16 2^-11, int8 2^-8 of the largest weight of a channel.
TOLERANCES: dict[str | None, float] = {
    None: 1e-4,
    "float16": 1e-2,
    "dynamic": 0.1,
    "int8": 0.2,
    "int16x8": 0.1,
}
_ROOT_MEAN_SQUARE = {"dynamic", "int8", "int16x8"}
_HALF_PRECISION_TOLERANCE = 5e-2

# Stands for the name of the input of a file that has only one; the worker knows it too.
ONLY_INPUT = "*"

_WORKERS = Path(__file__).parent
_LITERT = "litert_worker.py"
_SAVED_MODEL = "savedmodel_worker.py"
_RUN_BATCH = 128
_TIME_LIMIT_SECONDS = 1800


def compute_tolerance(model: keras.Model, quantization: str | None = None) -> float:
    """Allowed relative error of a file: that of its format, or of a half precision model."""
    half = any(
        getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")
        for layer in layers_within(model)
    )
    tolerance = TOLERANCES[quantization]
    return max(tolerance, _HALF_PRECISION_TOLERANCE) if half else tolerance


def finite_reference(model: keras.Model, signature: Signature, inputs: Named) -> Named:
    """The Keras model's outputs, which must be finite to compare anything with them.

    Raises:
        ExportError: if an output has NaN or infinite values.
    """
    outputs = signature.predict(model, inputs)
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise ExportError(
                f"Model {model.name!r} returns NaN or infinite values at {name!r}: nothing can be "
                "verified against it. Check its weights, or pass inputs it can handle as "
                "verify_data."
            )
    return outputs


def compare_outputs(
    reference: Named, found: Named, *, tolerance: float, quantization: str | None, what: str
) -> float:
    """Compares the outputs of a file with the Keras model's.

    Args:
        reference: outputs of the Keras model, by name.
        found: outputs of the file, by name.
        tolerance: largest relative error allowed.
        quantization: format of the file, which decides the measure.
        what: the file, for messages.

    Returns:
        The largest relative error over the outputs.

    Raises:
        ExportError: if an output is missing, has another shape, is not finite or is too far off.
    """
    worst = 0.0
    for name, expected in reference.items():
        if name not in found:
            raise ExportError(f"{what} has no output {name!r}. Found {sorted(found)}.")
        values = found[name]
        if values.shape != expected.shape:
            raise ExportError(
                f"{what} returns shape {values.shape} at {name!r}; the Keras model returns "
                f"{expected.shape}."
            )
        if not np.isfinite(values).all():
            raise ExportError(f"{what} returns NaN or infinite values at {name!r}.")
        error = _relative_error(expected, values, quantization)
        if error > tolerance:
            raise ExportError(
                f"{what} does not agree with the Keras model at output {name!r}: relative error "
                f"{error:.2e}, allowed {tolerance:.0e}. Nothing was kept."
                + (
                    " Quantization may cost this model too much: try 'float16', or inputs from "
                    "the real data as verify_data."
                    if quantization in _ROOT_MEAN_SQUARE
                    else ""
                )
            )
        worst = max(worst, error)
    return worst


def _relative_error(expected: np.ndarray, found: np.ndarray, quantization: str | None) -> float:
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    error = np.abs(found - expected)
    if quantization in _ROOT_MEAN_SQUARE:
        size, scale = np.sqrt(np.mean(error**2)), np.sqrt(np.mean(expected**2))
    else:
        size, scale = np.max(error), np.max(np.abs(expected))
    return float(size / max(scale, np.finfo(np.float32).tiny)) if size > 0 else 0.0


def run_litert(file: Path, inputs: Named, *, threads: int = 1, what: str = "") -> Named:
    """Outputs of a ``.tflite`` file, by name, run by LiteRT in a process without TensorFlow.

    Args:
        file: the file to run.
        inputs: arrays by input name.
        threads: number of threads.
        what: how messages call the file, if not by its name.

    Returns:
        Arrays by output name.

    Raises:
        ExportError: if LiteRT is not installed, or cannot load or run the file.
    """
    job = {"file": os.fspath(file), "threads": threads}
    return litert_job("run", job, inputs, what=what or str(file))


def litert_job(
    action: str, job: Mapping[str, Any], inputs: Named | None = None, *, what: str
) -> Named:
    """Lets the LiteRT worker do a job and returns the arrays it stored."""
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise ExportError(
            "LiteRT is needed to run a .tflite file and is not installed. Install it with "
            "pip install ai-edge-litert, or pass verify=False to write the file unverified."
        )
    return _work(_LITERT, action, job, inputs, what)


def run_saved_model(folder: Path, inputs: Named, *, what: str = "") -> Named:
    """Outputs of a SavedModel, by name, run in a process that does not import this package.

    Arguments and result as for `run_litert`.

    Raises:
        ExportError: if TensorFlow cannot load or run it there.
    """
    return _work(_SAVED_MODEL, "run", {"file": os.fspath(folder)}, inputs, what or str(folder))


def _work(
    worker: str, action: str, job: Mapping[str, Any], inputs: Named | None, what: str
) -> Named:
    """Starts a worker program on a temporary job folder; returns the arrays it leaves there."""
    environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="2", CUDA_VISIBLE_DEVICES="-1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        described = {"batch_size": _RUN_BATCH, "inputs": list(inputs or ()), **job}
        (folder / "job.json").write_text(json.dumps(described))
        np.savez(folder / "inputs.npz", *(inputs or {}).values())
        # -P: the folder of the worker must not shadow modules that it imports.
        command = [sys.executable, "-P", os.fspath(_WORKERS / worker), action, temporary]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIME_LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{what}: running it took more than {_TIME_LIMIT_SECONDS} s."
            ) from error
        if done.returncode != 0:
            reason = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise ExportError(f"{what} cannot be run (exit code {done.returncode}):\n{reason}")
        names = json.loads((folder / "results.json").read_text())
        with np.load(folder / "results.npz") as archive:
            return dict(zip(names, (archive[key] for key in archive.files), strict=True))
