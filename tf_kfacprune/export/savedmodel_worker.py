"""Runs a SavedModel in a process of its own, with nothing but TensorFlow imported.

This file is a program, started by path: it must not import the package, which may register the
very classes whose absence it checks.

    python savedmodel_worker.py run FOLDER   job.json, inputs.npz -> results.npz, results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf


def plain(values: np.ndarray) -> np.ndarray:
    """Text as bytes of one width, which are stored without pickle; numbers as they are."""
    return values.astype(bytes) if values.dtype == object else values


def main() -> None:
    """Runs the inputs through the folder's default signature and stores the outputs."""
    folder = Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    serve = tf.saved_model.load(job["file"]).signatures["serving_default"]
    with np.load(folder / "inputs.npz") as archive:
        inputs = dict(zip(job["inputs"], (archive[key] for key in archive.files), strict=True))
    specs = serve.structured_input_signature[1]
    count = len(next(iter(inputs.values())))
    size = next(iter(specs.values())).shape[0] or min(count, job["batch_size"])
    collected: dict[str, list[np.ndarray]] = {}
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        batch = {name: tf.constant(values[rows]) for name, values in inputs.items()}
        for name, values in serve(**batch).items():
            collected.setdefault(name, []).append(plain(values.numpy()))
    outputs = {name: np.concatenate(parts)[:count] for name, parts in collected.items()}
    np.savez(folder / "results.npz", *outputs.values())
    (folder / "results.json").write_text(json.dumps(list(outputs)))
    if "tf_kfacprune" in sys.modules:
        raise SystemExit("The package was imported: this is no test of the SavedModel alone.")


if __name__ == "__main__":
    main()
