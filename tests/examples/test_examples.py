"""The examples: short, on the public interface only, and running as a user would run them."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from absl import flags

import tf_kfacprune as kp

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def load_example():
    """Loads an example as a module with parsed flags; its flags are gone afterwards."""
    before = set(flags.FLAGS)

    def load(name: str, *arguments: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        flags.FLAGS([name, *arguments])
        return module

    yield load
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 96)
    x = rng.normal(0.2, 0.05, (96, 8, 8, 1)).clip(0, 1).astype("float32")
    for label, columns in [(1, slice(4, None)), (2, slice(0, 4))]:
        x[y == label, :, columns] += 0.6
    np.savez(path, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_use_public_names_only(path):
    source = path.read_text()
    assert len(source.splitlines()) < 150
    doors = {name for name in vars(kp) if not name.startswith("_")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tf_kfacprune"):
            assert node.module == "tf_kfacprune", "import a public module, not an inner one"
            assert all(not alias.name.startswith("_") for alias in node.names)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "kp"
        ):
            assert node.attr in doors


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        # The example of the README, which is run as printed, does what this one does.
        pytest.param("digits_quickstart.py", ["--budget_macs=0.3"], marks=pytest.mark.slow),
        pytest.param(
            "mnist_lenet.py",
            ["--model=lenet300", "--budget_params=0.3", "--compare_dense"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "build_gated_by_hand.py",
            ["--policy=proximal", "--budget_macs=0.4"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_example_trains_prunes_exports_and_records(
    name, arguments, small_data, tmp_path, load_example, capsys
):
    out = tmp_path / "out"
    example = load_example(
        name,
        f"--data={small_data}",
        "--epochs=4",
        "--batch_size=8",
        f"--output_dir={out}",
        *arguments,
    )
    example.run()
    assert "Before and after pruning" in capsys.readouterr().out
    record = json.loads((out / "record.json").read_text())
    for measure, target in record["budget"]["asked"].items():
        assert record["budget"]["achieved"][measure] <= target + 1e-9
    assert (out / "compact.tflite").stat().st_size > 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_foreseen_errors_are_one_line_and_a_failure(path, tmp_path, load_example):
    (tmp_path / "taken").mkdir()
    example = load_example(path.name, f"--output_dir={tmp_path / 'taken'}", "--budget_macs=0.3")
    with pytest.raises(SystemExit, match=r"^error: .*already exists"):
        example.main([])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_budget_out_of_range_fails_before_anything_is_written(path, tmp_path, load_example):
    example = load_example(path.name, f"--output_dir={tmp_path / 'out'}", "--budget_macs=1.2")
    with pytest.raises(SystemExit, match=r"^error: .*macs=1.2"):
        example.main([])
    assert not list(tmp_path.iterdir())
