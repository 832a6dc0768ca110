"""Runs .tflite files with TensorFlow Lite Micro in a process of its own, without TensorFlow.

This file is a program, started by path: it must not import the package, which needs TensorFlow.

    python micro_worker.py measure FOLDER   job.json -> results.npz and results.json
    python micro_worker.py run FOLDER       job.json and inputs.npz -> results.npz and results.json

The runtime tells what it has allocated, and which operation it lacks, by printing only: what it
prints is read from its standard error stream.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from tflite_micro.python.tflite_micro import runtime
from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema

_ALLOCATED = re.compile(r"Arena allocation (total|head|tail) (\d+) bytes")
_LACKING = re.compile(r"Didn't find op for builtin opcode '(\w+)'")


def quantized(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Real values as the integers that a quantized input expects: q = x / scale + zero point."""
    dtype, scales = np.dtype(details["dtype"]), details["quantization_parameters"]["scales"]
    if not np.issubdtype(dtype, np.integer) or len(scales) == 0:
        return values.astype(dtype)
    zero, limits = details["quantization_parameters"]["zero_points"][0], np.iinfo(dtype)
    steps = np.round(values.astype(np.float64) / scales[0]) + zero
    return np.clip(steps, limits.min, limits.max).astype(dtype)


def real(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Integers of a quantized output as real values: x = (q - zero point) * scale."""
    scales = details["quantization_parameters"]["scales"]
    if not np.issubdtype(values.dtype, np.integer) or len(scales) == 0:
        return values
    zero = details["quantization_parameters"]["zero_points"][0]
    return ((values.astype(np.float64) - zero) * scales[0]).astype(np.float32)


def printed(action: Callable[[], Any]) -> str:
    """What the runtime prints meanwhile, and the exception it ends with, if any."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(None):
                action()
            ending = ""
        except (RuntimeError, ValueError) as error:
            ending = f"{type(error).__name__}: {error}"
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace") + ending


def lacking(content: bytes, arena: int) -> list[str]:
    """Names of the builtin operations of a file that the runtime does not have.

    It stops at the first one. So that it goes on, that one is called a rounding down from then on,
    which the runtime has and which takes no options: all operations are looked up before the first
    one is prepared.
    """
    found: list[str] = []
    while True:
        start = printed(partial(runtime.Interpreter.from_bytes, content, arena_size=arena))
        match = _LACKING.search(start)
        if match is None:
            return found
        found.append(match[1])
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
        for code in model.operatorCodes:
            if max(code.builtinCode, code.deprecatedBuiltinCode) == getattr(
                schema.BuiltinOperator, match[1]
            ):
                code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FLOOR
        builder = flatbuffers.Builder(len(content))
        builder.Finish(model.Pack(builder), b"TFL3")
        content = bytes(builder.Output())


def measure(folder: Path, job: dict[str, Any]) -> None:
    """Runs zeros once in a large arena; stores what was allocated, and what is lacking."""
    content = Path(job["file"]).read_bytes()
    names = lacking(content, job["arena"])
    sizes = dict.fromkeys(("total", "head", "tail"), 0)
    if not names:
        micro = runtime.Interpreter.from_bytes(content, arena_size=job["arena"])
        zeros(micro, job["names"])
        report = printed(micro.print_allocations)
        sizes = {name: int(size) for name, size in _ALLOCATED.findall(report)}
    store(folder, {"lacking": np.array(names, "U64"), **{n: np.array(s) for n, s in sizes.items()}})


def zeros(micro: Any, names: list[str]) -> None:
    """Runs an example of zeros."""
    for index in range(len(names)):
        details = micro.get_input_details(index)
        micro.set_input(np.zeros(details["shape"], details["dtype"]), index)
    micro.invoke()


def run(folder: Path, job: dict[str, Any]) -> None:
    """Runs the examples one by one in an arena of the given size; stores the outputs in order.

    Zeros if there are no examples: then it is about the arena only.
    """
    content = Path(job["file"]).read_bytes()
    micro = runtime.Interpreter.from_bytes(content, arena_size=job["arena"])
    with np.load(folder / "inputs.npz") as archive:
        inputs = [archive[key] for key in archive.files]
    if not inputs:
        zeros(micro, job["names"])
        store(folder, {})
        return
    details = [micro.get_input_details(index) for index in range(len(inputs))]
    collected: list[list[np.ndarray]] = [[] for _ in range(job["outputs"])]
    for example in range(len(inputs[0])):
        for index, (values, about) in enumerate(zip(inputs, details, strict=True)):
            micro.set_input(quantized(values[example : example + 1], about), index)
        micro.invoke()
        for index, found in enumerate(collected):
            found.append(real(micro.get_output(index), micro.get_output_details(index)))
    store(folder, {str(i): np.concatenate(found) for i, found in enumerate(collected)})


def store(folder: Path, results: dict[str, np.ndarray]) -> None:
    """Leaves the arrays for the process that started this one."""
    np.savez(folder / "results.npz", *results.values())
    (folder / "results.json").write_text(json.dumps(list(results)))


def main() -> None:
    """Does the job that the command line names."""
    action, folder = sys.argv[1], Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    {"measure": measure, "run": run}[action](folder, job)
    if "tensorflow" in sys.modules:
        raise SystemExit("TensorFlow was imported: this is no test of TensorFlow Lite Micro alone.")


if __name__ == "__main__":
    main()
