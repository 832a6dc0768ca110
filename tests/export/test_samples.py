"""Calibration and verification inputs: accepted forms, and what is said about bad ones."""

from __future__ import annotations

import numpy as np
import pytest

from tf_kfacprune.errors import DataError, InvalidArgumentError
from tf_kfacprune.export.samples import (
    MAX_EXAMPLES,
    labelled_examples,
    named_examples,
    random_examples,
)
from tf_kfacprune.export.serving import Signature

ONE = Signature({"x": ((None, 3), "float32")}, ("output",))
TWO = Signature({"a": ((None, 2), "float32"), "b": ((None, 2, 2), "int32")}, ("output",))
A, B = np.arange(8.0).reshape(4, 2), np.ones((4, 2, 2), int)
X = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    "data",
    [
        X,
        [X],
        {"x": X},
        (X, np.zeros(4)),
        iter([X[:3], X[3:]]),
        ((part, np.zeros(2)) for part in (X[:2], X[2:])),
        lambda: ([row[None]] for row in X),
    ],
    ids=["array", "list", "dict", "x and y", "iterator", "iterator of x and y", "function"],
)
def test_one_input_is_taken_from_any_form(data):
    examples = named_examples(data, ONE, "verify_data")
    np.testing.assert_array_equal(examples["x"], X.astype(np.float32))
    assert examples["x"].dtype == np.float32


@pytest.mark.parametrize(
    "data", [[A, B], {"b": B, "a": A}, iter([((A, B), np.zeros(4))]), iter([({"a": A, "b": B}, 0)])]
)
def test_several_inputs_are_taken_by_name_or_order(data):
    examples = named_examples(data, TWO, "verify_data")
    np.testing.assert_array_equal(examples["a"], A)
    assert examples["b"].dtype == np.int32


def test_tf_dataset_is_taken_batch_by_batch():
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((X, np.zeros(4))).batch(3)
    np.testing.assert_array_equal(named_examples(dataset, ONE, "verify_data")["x"], X)


def test_endless_data_is_read_only_as_far_as_needed():
    def endless():
        while True:
            yield np.ones((100, 3))

    assert len(named_examples(endless(), ONE, "verify_data")["x"]) == MAX_EXAMPLES


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (np.zeros((0, 3)), "empty"),
        (iter([]), "empty"),
        (np.zeros((4, 2)), r"shape \('n', 3\).*\(4, 2\)"),
        (np.zeros(3), r"\(3,\).*batch axis"),
        (np.array([[1.0, np.nan, 0.0]]), "NaN"),
        (np.array([["a", "b", "c"]]), "numbers"),
        ({"y": X}, r"\['x'\] as keys.*\['y'\]"),
        ([X, X, X], "one array for each"),
        (7, "int"),
    ],
)
def test_bad_data_is_refused_by_name(data, said):
    with pytest.raises(DataError, match=said) as caught:
        named_examples(data, ONE, "representative_data")
    assert "representative_data" in str(caught.value)


def test_single_array_for_several_inputs_is_refused():
    with pytest.raises(DataError, match=r"dictionary of arrays.*\['a', 'b'\]"):
        named_examples(A, TWO, "verify_data")


def test_inputs_of_different_lengths_are_refused():
    with pytest.raises(DataError, match="one number of examples"):
        named_examples({"a": A, "b": B[:2]}, TWO, "verify_data")


def test_random_examples_are_the_same_at_every_call():
    first, second = random_examples(TWO), random_examples(TWO)
    np.testing.assert_array_equal(first["a"], second["a"])
    assert set(np.unique(first["b"])) == {0, 1}


def test_free_sizes_ask_for_data():
    free = Signature({"image": ((None, None, None, 3), "float32")}, ("output",))
    with pytest.raises(InvalidArgumentError, match=r"'image'.*verify_data"):
        random_examples(free)


@pytest.mark.parametrize(
    "data",
    [
        (X, [3, 2, 1, 0]),
        (X, np.array([[3], [2], [1], [0]])),
        ({"x": X}, np.array([3, 2, 1, 0])),
        iter([(X[:3], np.array([3, 2, 1])), (X[3:], np.array([0]))]),
    ],
    ids=["list", "column", "dict", "batches"],
)
def test_labels_come_with_pairs(data):
    examples = labelled_examples(data, ONE, "verify_data")
    assert examples.count == 4
    assert examples.labels.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3.0, 2.0, 1.0, 0.0], "float32"),
        np.eye(4)[[3, 2, 1, 0]],
        0.9 * np.eye(4, dtype="float32")[[3, 2, 1, 0]] + 0.025,
    ],
    ids=["floats", "one-hot", "smoothed"],
)
def test_classes_may_be_written_as_losses_want_them(labels):
    assert labelled_examples((X, labels), ONE, "verify_data").labels.tolist() == [3, 2, 1, 0]
    decisions = labelled_examples((X, labels[:, None] if labels.ndim == 1 else labels), ONE, "y")
    assert decisions.labels.tolist() == [3, 2, 1, 0]


def test_decisions_may_be_of_any_type():
    for kind in (bool, int, "float32"):
        labels = np.array([1, 0, 0, 1]).astype(kind)
        assert labelled_examples((X, labels), ONE, "verify_data").labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("targets", [np.full(4, 0.5), np.zeros((4, 2), int), np.full((4, 1), 0.5)])
def test_targets_that_are_no_classes_are_left_out(targets):
    assert labelled_examples((X, targets), ONE, "verify_data").labels is None


def test_labels_must_be_as_many_as_inputs():
    with pytest.raises(DataError, match="3 labels for 4 inputs"):
        labelled_examples((X, [0, 1, 2]), ONE, "verify_data")


def test_all_labelled_examples_are_taken_but_few_without_labels():
    many = np.zeros((3 * MAX_EXAMPLES, 3))
    assert labelled_examples((many, np.zeros(len(many), int)), ONE, "v").count == len(many)
    assert labelled_examples(many, ONE, "v").count == MAX_EXAMPLES
    assert labelled_examples((part for part in many[:, None]), ONE, "v").count == MAX_EXAMPLES
