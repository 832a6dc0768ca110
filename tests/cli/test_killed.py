"""`kill -9` at random points: nothing is lost or half written. Slow, bounded in time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pytest

from tf_kfacprune.export import run_tflite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL"),
]

KILLS = 10
# Whatever the machine: enough kills to mean something, in a time that is known.
SECONDS = 600


@contextmanager
def started(*arguments, cwd):
    """A process of the program, which does not live longer than the block."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "kfacprune", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.fspath(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def timed(*arguments, cwd):
    """Seconds of a run that must succeed."""
    begin = time.monotonic()
    with started(*arguments, cwd=cwd) as process:
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return time.monotonic() - begin


def killed(arguments, seconds, cwd):
    """Whether a run was killed after so long; it may have ended before."""
    with started(*arguments, cwd=cwd) as process:
        try:
            printed = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return True
    assert process.returncode == 0, printed
    return False


def weights(file):
    model = keras.models.load_model(file)
    return [keras.ops.convert_to_numpy(variable) for variable in model.variables]


def assert_equal_models(first, second):
    for found, expected in zip(weights(first), weights(second), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_training_killed_at_random_points_ends_as_if_undisturbed(small, tmp_path):
    flags = [
        f"--model={small / 'out2.keras'}",
        f"--data={small / 'bars.npz'}",
        "--budget_macs=0.5",
        "--optimizer=adam",  # what is saved is the same, what is traced a fraction
        "--policy=magnitude",
        "--epochs=100",
        "--batch_size=8",
    ]
    whole = timed("train", *flags, "--output_dir=whole", cwd=tmp_path)
    resumed = ["train", "--resume", *flags, "--output_dir=out"]
    draw, kills, end = random.Random(0), 0, time.monotonic() + SECONDS
    while kills < KILLS and time.monotonic() < end:
        # Half of them late, where states are saved and files are written.
        seconds = draw.uniform(0.5, 1.0) * whole if kills % 2 else draw.uniform(0.0, whole)
        if killed(resumed, seconds, tmp_path):
            kills += 1
        elif not (tmp_path / "out.resume").exists():
            assert_equal_models(tmp_path / "out" / "model.keras", tmp_path / "whole/model.keras")
            resumed = ["train", "--resume", "--overwrite", *flags, "--output_dir=out"]
    print(f"killed {kills} times; an undisturbed run takes {whole:.0f} s")
    assert kills >= 3
    timed(*resumed, cwd=tmp_path)
    for name in ("model.keras", "compact.keras"):
        assert_equal_models(tmp_path / "out" / name, tmp_path / "whole" / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compact.keras",
        "compact.tflite",
        "model.keras",
        "record.json",
        "report.html",
        "saved_model",
    ]


def test_export_killed_at_random_points_leaves_the_old_file_or_the_new_one(small, tmp_path):
    arguments = ["export", f"--model={small / 'out2.keras'}", "--output=net.tflite", "--overwrite"]
    whole = timed(*arguments, cwd=tmp_path)
    new = (tmp_path / "net.tflite").read_bytes()
    draw, kills, end = random.Random(0), 0, time.monotonic() + SECONDS
    while kills < KILLS and time.monotonic() < end:
        (tmp_path / "net.tflite").write_bytes(b"old")
        kills += killed(arguments, draw.uniform(0.3, 1.0) * whole, tmp_path)
        left = (tmp_path / "net.tflite").read_bytes()
        assert left == b"old" or len(left) == len(new)
    print(f"killed {kills} times; an undisturbed export takes {whole:.0f} s")
    assert kills >= 3
    timed(*arguments, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["net.tflite"]
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 1)).astype("float32")
    expected = keras.models.load_model(small / "out2.keras").predict(x, verbose=0)
    np.testing.assert_allclose(run_tflite(tmp_path / "net.tflite", x), expected, atol=1e-5)
