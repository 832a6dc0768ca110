"""Benchmarks as modules, without leaving their flags behind."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from absl import flags

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(name="load_benchmark", scope="module")
def benchmark_loader():
    before = set(flags.FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))

        def load(name):
            module = importlib.import_module(name)
            flags.FLAGS([name])
            return module

        yield load
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
