"""The JSON record of a run: enough to judge it and to make it again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.export.atomic import write_bytes
from tf_kfacprune.reporting.comparison import Comparison

__all__ = ["command_line", "record", "versions", "write_json_atomic"]

_PACKAGES = ("tf_kfacprune", "tensorflow", "keras", "numpy", "ai-edge-litert")

# A list of plain numbers goes on one line: a thousand kept neurons are not a thousand lines.
_NUMBER_LIST = re.compile(r"\[\n\s+((?:[-+\d.eE]+,\n\s+)*[-+\d.eE]+)\n\s+\]")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result.

    Returns:
        Name -> version, ``"not installed"`` for what is missing.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def record(
    comparison: Comparison,
    *,
    data: str,
    seed: int | None,
    budget: Mapping[str, float] | None = None,
    command: Sequence[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Collects what a run was asked, what it reached, and how to make it again.

    Args:
        comparison: the figures before and after.
        data: name or path of the data set.
        seed: the random seed.
        budget: the budget asked for, for example ``{"macs": 0.1}``.
        command: the command line; by default that of this process.
        **more: further values that JSON can hold, such as ``epochs=40``.

    Returns:
        A dictionary that `write_json_atomic` can write.

    Raises:
        InvalidArgumentError: if ``more`` uses a name of the record itself.
    """
    reached = {
        measure: fraction
        for measure in ("macs", "params")
        if (fraction := comparison.fraction(measure)) is not None
    }
    figures = comparison.to_dict()
    kept, outcomes = figures.pop("kept"), figures.pop("budget")
    reached |= {m: o["achieved"] for m, o in outcomes.items() if m not in reached}
    reasons = {m: o["reason"] for m, o in outcomes.items()}
    content = {
        "data": data,
        "seed": seed,
        "budget": {"asked": dict(budget or {}), "achieved": reached, "reasons": reasons},
        **figures,
        "kept_neurons": kept,
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "command": shlex.join(_portable_command() if command is None else command),
    }
    if clash := sorted(set(more) & set(content)):
        raise InvalidArgumentError(
            f"These names belong to the record itself: {clash}. Choose others."
        )
    return content | more


def write_json_atomic(
    path: str | os.PathLike[str], content: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Writes a dictionary as indented JSON, whole or not at all.

    Args:
        path: the file to write.
        content: plain values. NumPy numbers are taken, NaN and infinity are not JSON.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        InvalidArgumentError: if a value cannot be written as JSON.
        ExportError: if the path exists or cannot be written.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{path}: the record cannot be written as JSON: {error}.") from (
            error
        )
    text = _NUMBER_LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    return write_bytes(path, f"{text}\n".encode(), overwrite=overwrite)


def _plain(value: Any) -> Any:
    """Plain Python values of NumPy numbers and arrays, and text of paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")


def command_line() -> str | None:
    """The command that started this process; None in a notebook or an interactive session."""
    program = Path(sys.argv[0]).name
    is_command = program not in ("", "-c", "-m") and "ipykernel" not in sys.argv[0]
    is_command = is_command and program != "colab_kernel_launcher.py"
    return shlex.join(_portable_command()) if is_command else None


def _portable_command() -> list[str]:
    """The command line, with interpreter and program named as on any machine."""
    program = Path(sys.argv[0])
    if program.is_absolute():
        inside = program.is_relative_to(Path.cwd())
        program = program.relative_to(Path.cwd()) if inside else Path(program.name)
    interpreter = ["python"] if program.suffix == ".py" else []
    return [*interpreter, program.as_posix(), *sys.argv[1:]]
