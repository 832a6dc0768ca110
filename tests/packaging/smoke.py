"""Builds wheel and sdist and tries each in a fresh environment, away from the sources.

    python tests/packaging/smoke.py                 # or: make wheel
    python tests/packaging/smoke.py --versions tensorflow==2.21.0 keras==3.15.0

Not part of the test suite: every environment takes TensorFlow anew, some minutes and gigabytes.
What is tried: both files hold the package, its type marker and its license; the installed package
trains and prunes a small network, compacts it, writes a report and a `.tflite`; its command runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("tf_kfacprune/__init__.py", "tf_kfacprune/py.typed", "LICENSE")

TRIAL = """
import sys, numpy as np, keras
import tf_kfacprune as kp
assert "site-packages" in kp.__file__, kp.__file__
x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
y = (x[:, 0] > 0).astype("int64")
net = keras.Sequential([
    keras.Input((8,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(2)])
pm = kp.PrunableModel(net, kp.Budget(macs=0.5), seed=0)
pm.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
pm.fit(x, y, batch_size=16, epochs=5, verbose=0)
small = kp.compact(pm)
assert kp.inspect(small).macs <= 0.5 * kp.inspect(net).macs
kp.export.tflite(small, "small.tflite", verify_data=x)
kp.report(pm, small, data=(x, y), html="report.html")
print("tried", kp.__version__, "with keras", keras.__version__)
"""


def build(folder: Path) -> list[Path]:
    """Builds both files, the wheel first, from a copy of what git knows: nothing else slips in."""
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    tools = environment(folder / "tools")
    run(tools, "-m", "pip", "install", "--quiet", "build")
    built, kept = folder / "built", ROOT / "dist"
    run(tools, "-m", "build", "--outdir", str(built), str(source))
    kept.mkdir(exist_ok=True)
    return [Path(shutil.copy(path, kept)) for path in sorted(built.iterdir(), reverse=True)]


def contents(path: Path) -> list[str]:
    """Names of the files in a wheel or an sdist."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    with tarfile.open(path) as archive:
        return archive.getnames()


def check_contents(path: Path) -> None:
    """Ends the program if something is missing, or is there that does not belong there."""
    names = contents(path)
    missing = [need for need in NEEDED if not any(name.endswith(need) for name in names)]
    if missing:
        sys.exit(f"{path.name} lacks {', '.join(missing)}.")
    if path.suffix == ".whl" and any(name.startswith(("tests", "docs")) for name in names):
        sys.exit(f"{path.name} holds tests or pages, which are not to be installed.")


def environment(folder: Path) -> Path:
    """A fresh environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def run(python: Path, *arguments: str, cwd: Path | None = None) -> None:
    """Runs a Python to a good end, without the variables that would let it see the sources."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    clean["TF_CPP_MIN_LOG_LEVEL"] = "3"
    subprocess.run([str(python), *arguments], cwd=cwd, env=clean, check=True)


def try_out(path: Path, folder: Path, versions: list[str]) -> None:
    """Installs a file with its dependencies and uses what it installs."""
    folder.mkdir()
    python = environment(folder / "environment")
    run(python, "-m", "pip", "install", "--quiet", str(path), *versions)
    run(python, "-c", TRIAL, cwd=folder)
    command = python.with_name("kfacprune")
    subprocess.run([str(command), "inspect", "--model=lenet300"], cwd=folder, check=True)


def main() -> None:
    """Builds, looks inside, and tries both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--versions", nargs="*", default=[], help="Requirements to install with, e.g. keras==3.15.0"
    )
    versions = parser.parse_args().versions
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in build(folder):
            check_contents(path)
            try_out(path, folder / path.suffix[1:], versions)
            print(f"{path.name}: fine", flush=True)


if __name__ == "__main__":
    main()
