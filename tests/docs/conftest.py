"""The script that makes the tables of the pages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "generate.py"


@pytest.fixture(name="generate", scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="results")
def results_folder(generate, monkeypatch, tmp_path):
    """An empty folder in place of that of the records."""
    monkeypatch.setattr(sys.modules["tables.markdown"], "RESULTS", tmp_path)
    return tmp_path
