"""Runs written files in clean processes, where what they must not need is not imported."""

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

import numpy as np

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export.samples import Named

__all__ = [
    "ONLY_INPUT",
    "has_micro",
    "litert_job",
    "micro_job",
    "require_micro",
    "run_litert",
    "run_saved_model",
]

# Stands for the name of the input of a file that has only one; the worker knows it too.
ONLY_INPUT = "*"

_WORKERS = Path(__file__).parent
_LITERT = "litert_worker.py"
_SAVED_MODEL = "savedmodel_worker.py"
_MICRO = "micro_worker.py"
_RUN_BATCH = 128
_TIME_LIMIT_SECONDS = 1800


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


def has_micro() -> bool:
    """Whether TensorFlow Lite Micro is installed."""
    return importlib.util.find_spec("tflite_micro") is not None


def micro_job(
    action: str, job: Mapping[str, Any], inputs: Named | None = None, *, what: str
) -> Named:
    """Lets the worker of TensorFlow Lite Micro do a job and returns the arrays it stored.

    Raises:
        ExportError: if the runtime is not installed, or cannot do it.
    """
    require_micro()
    return _work(_MICRO, action, job, inputs, what)


def require_micro() -> None:
    """Raises an `ExportError` if TensorFlow Lite Micro is not installed."""
    if not has_micro():
        raise ExportError(
            "TensorFlow Lite Micro is needed to run a .tflite file as a microcontroller does and "
            "is not installed. Install it on Linux x86-64 with pip install 'tf_kfacprune[micro]'; "
            "elsewhere kp.export.arena_bytes estimates the memory, and LiteRT runs the file."
        )


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
            raise ExportError(
                f"{what} cannot be run (exit code {done.returncode}):\n"
                + _reason(done.stdout + done.stderr)
            )
        names = json.loads((folder / "results.json").read_text())
        with np.load(folder / "results.npz") as archive:
            return dict(zip(names, (archive[key] for key in archive.files), strict=True))


def _reason(printed: str) -> str:
    """The last lines that a worker printed, without the steps of a traceback: they are its own."""
    steps = (" ", "Traceback", "INFO")
    lines = [line for line in printed.splitlines() if line and not line.startswith(steps)]
    return "\n".join(lines[-15:])
