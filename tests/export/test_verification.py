"""Comparison of outputs: what counts as the same network in each format."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export import verification
from tf_kfacprune.export.verification import TOLERANCES, compare_outputs, compute_tolerance

Y = np.linspace(-2.0, 4.0, 24).reshape(8, 3).astype("float32")


def compare(found, quantization=None, reference=Y):
    return compare_outputs(
        {"output": reference},
        {"output": found},
        tolerance=TOLERANCES[quantization],
        quantization=quantization,
        what="The file",
    )


def test_float_formats_are_held_to_the_largest_error():
    found = Y.copy()
    found[3, 1] += 4.0 * 0.9e-4
    assert compare(found) == pytest.approx(0.9e-4, rel=1e-2)
    found[3, 1] += 4.0 * 0.2e-4
    with pytest.raises(ExportError, match=r"'output': relative error 1\.1\de-04, allowed 1e-04"):
        compare(found)


def test_integer_formats_are_held_to_the_root_mean_square():
    found = Y.copy()
    found[0, 0] += 0.5 * np.sqrt(np.mean(Y**2))  # one saturated value among 24
    assert compare(found, "int8") == pytest.approx(0.5 / np.sqrt(24), rel=1e-5)
    with pytest.raises(ExportError, match="try 'float16'"):
        compare(Y * 1.3, "int8")


@pytest.mark.parametrize("quantization", list(TOLERANCES))
def test_permuted_classes_are_found_in_every_format(quantization):
    with pytest.raises(ExportError, match="does not agree"):
        compare(Y[:, ::-1], quantization)


@pytest.mark.parametrize(
    ("found", "said"),
    [(Y[:, :2], r"shape \(8, 2\)"), (Y * np.nan, "NaN"), (Y + np.inf, "infinite")],
)
def test_wrong_shape_and_nan_are_found(found, said):
    with pytest.raises(ExportError, match=said):
        compare(found)


def test_missing_output_is_named():
    with pytest.raises(ExportError, match=r"no output 'output'. Found \['other'\]"):
        compare_outputs(
            {"output": Y}, {"other": Y}, tolerance=1.0, quantization=None, what="The file"
        )


def test_all_zero_reference_allows_only_zeros():
    zeros = np.zeros_like(Y)
    assert compare(zeros, reference=zeros) == 0.0
    with pytest.raises(ExportError):
        compare(zeros + 1e-6, reference=zeros)


def test_half_precision_models_get_their_own_tolerance():
    def net(policy):
        layer = keras.layers.Dense(2, dtype=policy)
        return keras.Sequential([keras.Input((3,)), layer])

    assert compute_tolerance(net("float32")) == 1e-4
    assert compute_tolerance(net("mixed_float16")) == 5e-2


def test_missing_litert_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(verification.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install ai-edge-litert.*verify=False"):
        verification.run_litert(tmp_path / "net.tflite", {"x": Y})
