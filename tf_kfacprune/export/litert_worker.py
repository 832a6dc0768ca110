"""Runs .tflite files with LiteRT in a process of its own, where TensorFlow is never imported.

This file is a program, started by path: it must not import the package, which needs TensorFlow.

    python litert_worker.py run FOLDER     job.json and inputs.npz -> results.npz and results.json
    python litert_worker.py time FOLDER    job.json -> results.npz and results.json
    python litert_worker.py memory FOLDER  job.json -> results.npz and results.json

Arrays are stored in order and their names in JSON, because any name may be a tensor's.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

SIGNATURE = "serving_default"
ONLY_INPUT = "*"


def quantized(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Real values as the integers that a quantized input expects: q = x / scale + zero point."""
    dtype = details["dtype"]
    scales = details["quantization_parameters"]["scales"]
    if not np.issubdtype(dtype, np.integer) or len(scales) == 0:
        return values.astype(dtype)
    zero = details["quantization_parameters"]["zero_points"][0]
    limits = np.iinfo(dtype)
    steps = np.round(values.astype(np.float64) / scales[0]) + zero
    return np.clip(steps, limits.min, limits.max).astype(dtype)


def real(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Integers of a quantized output as real values: x = (q - zero point) * scale."""
    scales = details["quantization_parameters"]["scales"]
    if not np.issubdtype(values.dtype, np.integer) or len(scales) == 0:
        return values
    zero = details["quantization_parameters"]["zero_points"][0]
    return ((values.astype(np.float64) - zero) * scales[0]).astype(np.float32)


def run(folder: Path, job: dict[str, Any]) -> None:
    """Runs the inputs through the file, batch by batch, and stores its outputs."""
    runner = Interpreter(model_path=job["file"], num_threads=job["threads"]).get_signature_runner(
        SIGNATURE
    )
    details = runner.get_input_details()
    with np.load(folder / "inputs.npz") as archive:
        inputs = dict(zip(job["inputs"], (archive[key] for key in archive.files), strict=True))
    if list(inputs) == [ONLY_INPUT] and len(details) == 1:
        inputs = {next(iter(details)): inputs[ONLY_INPUT]}
    if set(inputs) != set(details):
        given = "a single array" if ONLY_INPUT in inputs else f"arrays for {sorted(inputs)}"
        raise SystemExit(
            f"The file has inputs {sorted(details)}. Received: {given}. Expected: a dictionary of "
            "arrays by these names."
        )
    count = len(next(iter(inputs.values())))
    fixed = {int(d["shape_signature"][0]) for d in details.values()} - {-1}
    size = fixed.pop() if fixed else min(count, job["batch_size"])
    collected: dict[str, list[np.ndarray]] = {}
    for start in range(0, count, size):
        batch = {}
        for name, values in inputs.items():
            # The last batch of a fixed size is filled up with the last example.
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch[name] = quantized(values[rows], details[name])
        for name, values in runner(**batch).items():
            collected.setdefault(name, []).append(values)
    shown = runner.get_output_details()
    outputs = {
        name: real(np.concatenate(parts)[:count], shown[name]) for name, parts in collected.items()
    }
    store(folder, outputs)


def measure(folder: Path, job: dict[str, Any]) -> None:
    """Times the files in interleaved blocks; stores the median microseconds of every block."""
    interpreters = []
    for file in job["files"]:
        interpreter = Interpreter(model_path=file, num_threads=job["threads"])
        for details in interpreter.get_input_details():
            shape = [
                job["batch_size"] if size == -1 else size for size in details["shape_signature"]
            ]
            interpreter.resize_tensor_input(details["index"], shape)
        interpreter.allocate_tensors()
        rng = np.random.default_rng(0)
        for details in interpreter.get_input_details():
            values = rng.uniform(0.0, 1.0, details["shape"])
            interpreter.set_tensor(details["index"], quantized(values, details))
        interpreters.append(interpreter)
    gc.disable()
    times = np.empty((job["blocks"], len(interpreters)))
    first_times = [_block(interpreter, 3) for interpreter in interpreters]
    # A block of a slow model is cut short: it needs no 50 runs to show its median.
    runs = [
        max(3, min(job["runs"], int(job["block_seconds"] * 1e6 / max(t, 1e-3))))
        for t in first_times
    ]
    for block in range(-1, job["blocks"]):  # block -1 warms up
        for i, interpreter in enumerate(interpreters):
            times[max(block, 0), i] = _block(interpreter, runs[i])
    store(folder, {"microseconds": times})


def _block(interpreter: Interpreter, runs: int) -> float:
    """Median time of one invocation, in microseconds."""
    spent = np.empty(runs)
    for i in range(runs):
        start = time.perf_counter_ns()
        interpreter.invoke()
        spent[i] = time.perf_counter_ns() - start
    return float(np.median(spent)) / 1e3


def weigh(folder: Path, job: dict[str, Any]) -> None:
    """Stores by how much this process grew at most while it loaded the file and ran it once.

    Linux tells the largest size since it was last reset; elsewhere 0, for unknown, is stored.
    """
    gc.collect()
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _kilobytes(status, "VmHWM")
    except OSError:
        store(folder, {"bytes": np.array(0)})
        return
    interpreter = Interpreter(model_path=job["file"], num_threads=1)
    for details in interpreter.get_input_details():
        shape = [1 if size == -1 else size for size in details["shape_signature"]]
        interpreter.resize_tensor_input(details["index"], shape)
    interpreter.allocate_tensors()
    interpreter.invoke()
    store(folder, {"bytes": np.array(1024 * (_kilobytes(status, "VmHWM") - before))})


def _kilobytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def store(folder: Path, results: dict[str, np.ndarray]) -> None:
    """Leaves the arrays for the process that started this one."""
    np.savez(folder / "results.npz", *results.values())
    (folder / "results.json").write_text(json.dumps(list(results)))


def main() -> None:
    """Does the job that the command line names."""
    action, folder = sys.argv[1], Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    {"run": run, "time": measure, "memory": weigh}[action](folder, job)
    if "tensorflow" in sys.modules:
        raise SystemExit("TensorFlow was imported: this is no test of LiteRT alone.")


if __name__ == "__main__":
    main()
