"""Flags of the benchmarks: absl refuses a script in which two files define the same one."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


def syntax(script):
    return list(ast.walk(ast.parse((BENCHMARKS / f"{script}.py").read_text())))


def with_imported(script, seen):
    """A script and all others that it imports, directly or not."""
    if script not in seen:
        seen.add(script)
        for node in syntax(script):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in set(names) & set(SCRIPTS):
                with_imported(name, seen)
    return seen


def flags_of(script):
    """Names of the flags that a file defines."""
    for node in syntax(script):
        called = node.func.attr if getattr(getattr(node, "func", None), "attr", "") else ""
        if called.startswith("DEFINE_"):
            yield node.args[0].value


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_defined_twice(script):
    defined = Counter(flag for part in with_imported(script, set()) for flag in flags_of(part))
    assert [flag for flag, count in defined.items() if count > 1] == []
