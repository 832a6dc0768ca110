"""Runs the tests with the oldest and newest TensorFlow and Keras that `setup.cfg` allows.

    python tests/packaging/versions.py                          # or: make versions
    python tests/packaging/versions.py --corners oldest --tests tests/graph tests/compaction

Not part of the test suite: every corner is a fresh environment, which takes TensorFlow anew (some
minutes and gigabytes) and then as long as the tests. The Python is that which runs this script.
Extras are left out: they hold TensorFlow to versions of their own, and their tests are skipped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from smoke import ROOT, environment, run

CORNERS = {
    "oldest": ("tensorflow==2.18.*", "keras==3.12.*"),
    "old-tensorflow": ("tensorflow==2.18.*", "keras==3.15.*"),
    "old-keras": ("tensorflow==2.21.*", "keras==3.12.*"),
    "newest": ("tensorflow==2.21.*", "keras==3.15.*"),
}
TOOLS = ("hypothesis", "matplotlib", "pytest", "pytest-timeout", "scikit-learn")


def passes(corner: str, tests: list[str], folder: Path) -> bool:
    """Installs the versions of a corner, then runs the tests there."""
    python = environment(folder / corner)
    try:
        wheels = ["--quiet", "--prefer-binary"]
        run(python, "-m", "pip", "install", *wheels, str(ROOT), *CORNERS[corner], *TOOLS)
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=ROOT)
    except subprocess.CalledProcessError:
        return False
    return True


def main() -> None:
    """Tries every corner, says which pass, and fails if one does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corners", nargs="*", default=list(CORNERS), choices=CORNERS)
    parser.add_argument("--tests", nargs="*", default=["tests"], help="Files or folders to run.")
    asked = parser.parse_args()
    failed = []
    for corner in asked.corners:
        with tempfile.TemporaryDirectory() as name:
            fine = passes(corner, asked.tests, Path(name))
        print(
            f"{corner} ({', '.join(CORNERS[corner])}): {'fine' if fine else 'FAILED'}", flush=True
        )
        failed += [] if fine else [corner]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
