"""Comparison of outputs: what counts as the same network in each format."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.errors import DataError, ExportError
from tf_kfacprune.export import running
from tf_kfacprune.export.samples import Examples
from tf_kfacprune.export.verification import (
    TOLERANCES,
    compare_outputs,
    compute_tolerance,
    verify_outputs,
)

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
    logits = np.tile(4.0 * np.eye(3, dtype="float32"), (3, 1))
    with pytest.raises(ExportError, match="does not agree"):
        compare(logits[:, ::-1], quantization, reference=logits)


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


def test_half_precision_models_get_the_tolerance_of_their_dtype():
    def net(policy):
        layer = keras.layers.Dense(2, dtype=policy)
        return keras.Sequential([keras.Input((3,)), layer])

    assert compute_tolerance(net("float32")) == 1e-4
    assert compute_tolerance(net("mixed_float16")) == 20 * 2.0**-11
    assert compute_tolerance(net("mixed_bfloat16")) == 20 * 2.0**-8
    assert compute_tolerance(net("mixed_float16"), "int8") == 0.2


def test_missing_litert_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install ai-edge-litert.*verify=False"):
        running.run_litert(tmp_path / "net.tflite", {"x": Y})


def verify(reference, found, labels=None, quantization="int8", drop=0.01, tolerance=0.2):
    return verify_outputs(
        {"output": reference},
        {"output": found},
        Examples({"x": np.zeros((len(reference), 1))}, labels),
        tolerance=tolerance,
        quantization=quantization,
        max_accuracy_drop=drop,
        what="The file",
    )


def logits(margins):
    """Two classes; the first leads by the margin."""
    return np.stack([np.asarray(margins, "float32"), np.zeros(len(margins))], axis=1)


def test_choices_count_only_where_the_model_is_decided():
    reference = logits([3.0] * 90 + [0.01] * 10)
    found = reference.copy()
    found[90:, 1] = 0.02  # ten undecided examples change sides
    assert verify(reference, found).agreement == 1.0
    found[:4] = [1.5, 1.6]  # four decided ones of 90: within the 5 % that may
    assert verify(reference, found, tolerance=0.5).agreement == pytest.approx(86 / 90)
    found[:5] = [1.5, 1.6]
    with pytest.raises(ExportError, match=r"same class for 94\.4 %.*at least 95 %"):
        verify(reference, found, tolerance=0.5)
    assert verify(reference, found, tolerance=0.6, quantization=None).agreement < 0.95


def test_accuracy_may_drop_by_what_is_allowed_or_by_one_example():
    reference = logits([0.1] * 200)
    labels = np.zeros(200, int)
    found = reference.copy()
    found[:2, 1] = 0.11
    figures = verify(reference, found, labels)
    assert (figures.accuracy, figures.model_accuracy) == (0.99, 1.0)
    found[:3, 1] = 0.11
    with pytest.raises(ExportError, match=r"98\.50 % against 100\.00 %.*drop of 1\.00 points"):
        verify(reference, found, labels)
    assert verify(reference, found, labels, drop=0.02).accuracy == 0.985
    found[1:3, 1] = 0.0
    assert verify(reference, found, labels, drop=0.0).accuracy == 0.995


@pytest.mark.parametrize("is_logit", [False, True], ids=["probability", "logit"])
@pytest.mark.parametrize("shape", [(200,), (200, 1)])
def test_a_single_output_decides_between_two_classes(shape, is_logit):
    labels = np.arange(200) % 2
    right = np.where(labels, 0.55, 0.45) - 0.5 * is_logit
    reference = right.reshape(shape).astype("float32")
    found = reference.copy()
    found[:4] = 1.0 - 2.0 * 0.5 * is_logit - reference[:4]  # on the other side
    figures = verify(reference, found, labels, drop=0.02, tolerance=1.0)
    assert (figures.accuracy, figures.model_accuracy) == (0.98, 1.0)
    with pytest.raises(ExportError, match=r"98\.00 % against 100\.00 %"):
        verify(reference, found, labels, tolerance=1.0)
    values = verify(reference, found, labels + 1, tolerance=1.0)  # counts, to be predicted
    assert (values.accuracy, values.model_accuracy) == (None, None)


def test_class_numbers_are_compared_as_they_are():
    classes = np.arange(100, dtype="int32") % 7
    found = classes.copy()
    assert verify(classes, found, classes, quantization=None, tolerance=1e-4).accuracy == 1.0
    found[:3] += 1
    assert verify(classes, found, quantization="int8").error == pytest.approx(0.03)
    with pytest.raises(ExportError, match=r"relative error 3\.00e-02"):
        verify(classes, found, quantization=None, tolerance=1e-4)


@pytest.mark.parametrize(
    ("reference", "labels", "said"),
    [
        (logits([1.0, 1.0]), [0, 2], "from 0 to 1. Found 0 to 2"),
        (np.ones((2, 4, 4), "float32"), [0, 0], "one output of shape"),
    ],
)
def test_labels_that_are_no_classes_of_the_model_are_refused(reference, labels, said):
    with pytest.raises(DataError, match=said):
        verify(reference, reference, np.array(labels))
