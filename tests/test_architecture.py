"""The rules of the house, read from the source: imports point down, private parts stay put."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "tf_kfacprune"
ROOT = Path(__file__).parents[1] / PACKAGE

# A part may import parts of strictly lower rank, and itself.
RANKS = {
    "errors": -1,
    "validation": 0,
    "data": 1,
    "linalg": 1,
    "distribution": 1,
    "graph": 2,
    "gates": 3,
    "curvature": 4,
    "optimizers": 5,
    "pruning": 5,
    "training": 6,
    "compaction": 5,
    "tfmot": 6,
    "callbacks": 7,
    "export": 7,
    "zoo": 7,
    "reporting": 8,
    "layers": 9,  # public door: the gated layers
    "diagnostics": 9,  # public door: exact curvature
    PACKAGE: 10,  # the package's own __init__, which re-exports
    "cli": 11,
}

PRIVATE_KERAS_NAMES = {
    "_functional",
    "_inbound_nodes",
    "_keras_history",
    "_nodes_by_depth",
    "_outbound_nodes",
    "_run_through_graph",
}
HEAVY_MODULES = (
    "ai_edge_litert",
    "ai_edge_quantizer",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "tensorflow_model_optimization",
    "tf_keras",
)


def source_files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The ranked part that a module belongs to; ``gates`` for ``tf_kfacprune.gates.sources``."""
    return [*module.split("."), PACKAGE][1]


def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at any depth, with the line; names resolved to modules."""
    known = {module_name(file) for file in source_files()}
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module_name(path).split(".")
                keep = len(here) - node.level + (path.name == "__init__.py")
                base = ".".join([*here[:keep], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), node.lineno


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    for module, line in imported_modules(path):
        if module.split(".")[0] == PACKAGE:
            yield module, line


def relative(path: Path) -> str:
    return path.relative_to(ROOT.parent).as_posix()


def test_every_part_has_a_rank():
    parts = {part_of(module_name(path)) for path in source_files()}
    assert parts <= set(RANKS), f"no rank for {sorted(parts - set(RANKS))}"


def test_imports_point_down():
    upward = []
    for path in source_files():
        here = part_of(module_name(path))
        for module, line in own_imports(path):
            there = part_of(module)
            if there != here and RANKS[there] >= RANKS[here]:
                upward.append(f"{relative(path)}:{line} ({here}) imports {module}")
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle():
    edges = {module_name(path): {m for m, _ in own_imports(path)} for path in source_files()}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            pytest.fail("circular import: " + " -> ".join([*trail[trail.index(module) :], module]))
        if module not in finished:
            for target in sorted(edges.get(module, ())):
                visit(target, (*trail, module))
            finished.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_package_doors_only_re_export():
    for path in ROOT.rglob("__init__.py"):
        for node in syntax(path).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_plain_assignment = isinstance(node, ast.Assign) and all(
                isinstance(target, ast.Name) and target.id in ("__all__", "__version__")
                for target in node.targets
            )
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            assert is_docstring or is_plain_assignment or is_import, (
                f"{relative(path)}:{node.lineno} does more than re-export"
            )


def test_library_code_has_no_assert():
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Assert)
    ]
    assert not found, f"asserts vanish under python -O; raise an error instead: {found}"


def mentioned_names(path: Path) -> Iterator[tuple[str, int]]:
    """Attributes, definitions and exact strings (getattr, hasattr) that a file mentions."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno


def test_private_keras_graph_parts_are_touched_in_one_file_only():
    found = []
    for path in source_files():
        if relative(path) == f"{PACKAGE}/graph/keras_internals.py":
            continue
        found += [
            f"{relative(path)}:{line} uses {name}"
            for name, line in mentioned_names(path)
            if name in PRIVATE_KERAS_NAMES
        ]
        found += [
            f"{relative(path)}:{line} imports {module}"
            for module, line in imported_modules(path)
            if module.startswith("keras.src")
        ]
    assert not found, "\n".join(found)


def test_the_private_optimizer_hook_is_used_by_optimizers_only():
    found = [
        f"{relative(path)}:{line}"
        for path in source_files()
        for name, line in mentioned_names(path)
        if name == "_backend_update_step" and part_of(module_name(path)) != "optimizers"
    ]
    assert not found, found


def test_the_private_parts_of_keras_exist():
    """A guard against renames in Keras: what the rule allows must still be there."""
    import keras

    inputs = keras.Input((2,))
    functional = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert hasattr(functional, "_nodes_by_depth")
    assert hasattr(functional, "_run_through_graph")
    assert hasattr(keras.optimizers.Optimizer, "_backend_update_step")


def test_import_pulls_in_no_heavy_module():
    code = (
        "import sys, keras, tensorflow; before = set(sys.modules)\n"
        f"import {PACKAGE}\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    added = set(run.stdout.split())
    assert PACKAGE in added
    assert not added & set(HEAVY_MODULES)


# --- public names -------------------------------------------------------------------------------


def public_objects() -> Iterator[tuple[str, object]]:
    """``(dotted name, object)`` of the package's ``__all__`` and of the doors listed in it."""
    package = importlib.import_module(PACKAGE)
    for name in getattr(package, "__all__", ()):
        member = getattr(package, name)
        yield name, member
        if isinstance(member, ModuleType):
            assert getattr(member, "__all__", None), f"{name} has no __all__"
            yield from ((f"{name}.{inner}", getattr(member, inner)) for inner in member.__all__)


def documented_parameters(member: object) -> list[str]:
    """Parameters that the docstring must name; ``*args`` and ``**kwargs`` are free."""
    if dataclasses.is_dataclass(member):
        return [f.name for f in dataclasses.fields(member) if f.init]
    if inspect.isclass(member):
        own = inspect.getattr_static(member, "__init__", None)
        if "__init__" not in vars(member) or own is None:
            return []
        parameters = list(inspect.signature(own).parameters.values())[1:]
    else:
        parameters = list(inspect.signature(member).parameters.values())
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def documentation_faults(member: object) -> Iterator[str]:
    if not callable(member) and not isinstance(member, ModuleType):
        return  # a constant has no docstring of its own
    doc = inspect.getdoc(member) or ""
    own_doc = member.__dict__.get("__doc__") if inspect.isclass(member) else member.__doc__
    if not own_doc:
        yield "no docstring of its own"
        return
    if isinstance(member, ModuleType) or (
        inspect.isclass(member) and issubclass(member, Exception)
    ):
        return
    parameters = documented_parameters(member)
    if parameters and not re.search(r"^(Args|Attributes):$", doc, re.MULTILINE):
        yield "no 'Args:' section"
    for name in parameters:
        if not re.search(rf"^\s+(\w+, )*`*{name}`*(, \w+)*( \(.*\))?:", doc, re.MULTILINE):
            yield f"argument {name!r} is not described"
    if inspect.isfunction(member):
        tree = ast.parse(textwrap.dedent(inspect.getsource(member)))
        returned = [n for n in ast.walk(tree) if isinstance(n, ast.Return) and n.value is not None]
        if returned and not re.search(r"^(Returns|Yields):$", doc, re.MULTILINE):
            yield "no 'Returns:' section"
        if any(isinstance(n, ast.Raise) for n in ast.walk(tree)) and "Raises:" not in doc:
            yield "no 'Raises:' section"


def test_every_public_name_is_documented():
    faults = [
        f"{name}: {fault}"
        for name, member in public_objects()
        if name != "__version__"
        for fault in documentation_faults(member)
    ]
    assert not faults, "\n".join(faults)


def test_documentation_check_notices_what_is_missing():
    def poor(alpha: int) -> int:
        """Does something."""
        if alpha < 0:
            raise ValueError
        return alpha

    def good(alpha: int) -> int:
        """Does something.

        Args:
            alpha: A number.

        Returns:
            The number.

        Raises:
            ValueError: If it is negative.
        """
        if alpha < 0:
            raise ValueError
        return alpha

    assert len(list(documentation_faults(poor))) == 4
    assert not list(documentation_faults(good))
