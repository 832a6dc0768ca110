"""Labels of every kind in the form of their kind, or an error that says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tf_kfacprune.data import load
from tf_kfacprune.data.targets import checked_targets
from tf_kfacprune.errors import DataError, InvalidArgumentError


def targets(train, test=None, kind=None):
    train = np.asarray(train)
    return checked_targets(
        train, train if test is None else np.asarray(test), source="f.npz", kind=kind
    )


@pytest.mark.parametrize(
    ("train", "kind", "outputs", "expected"),
    [
        ([2, 0, 1], "classes", 3, [2, 0, 1]),
        ([[2], [0]], "classes", 3, [2, 0]),
        ([True, False], "classes", 2, [1, 0]),
        (["b", "a", "c"], "classes", 3, [1, 0, 2]),
        ([b"b", b"a"], "classes", 2, [1, 0]),
        ([[1, 1], [0, 1]], "binary", 2, [[1, 1], [0, 1]]),
        ([[True, True], [False, False]], "binary", 2, [[1, 1], [0, 0]]),
        ([0.0, 1.0], "binary", 1, [[0], [1]]),
        ([0.5, -2.0], "values", 1, [[0.5], [-2]]),
        ([[0.5, 1], [2, 3]], "values", 2, [[0.5, 1], [2, 3]]),
        ([[3, 1], [2, 3]], "values", 2, [[3, 1], [2, 3]]),
    ],
)
def test_kind_is_seen_and_labels_get_its_form(train, kind, outputs, expected):
    found = targets(train)
    assert (found.kind, found.outputs) == (kind, outputs)
    np.testing.assert_array_equal(found.train, expected)
    assert found.train.dtype == ("int64" if kind == "classes" else "float32")


def test_kind_that_is_asked_for_wins():
    assert targets([3, 5], kind="values").train.tolist() == [[3.0], [5.0]]
    assert targets([0, 1], kind="binary").train.tolist() == [[0.0], [1.0]]
    assert targets(np.eye(2), kind="binary").outputs == 2


def test_names_of_classes_are_numbered_in_their_order():
    found = targets(["dog", "cat", "dog"], ["cat", "dog"])
    assert found.names == ("cat", "dog")
    assert found.test.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("train", "test", "kind", "said"),
    [
        (np.eye(3), None, None, "looks like one-hot classes"),
        (["a", "b"], ["c"], None, "'c', of which 'y_train' has no example"),
        (["a", "b"], [0, 1], None, "must both hold names"),
        ([b"\xff", b"a"], None, None, "must hold text in UTF-8"),
        ([0, 2], None, "binary", "0 or 1 for every decision. Found 2"),
        ([[0.5, 1], [2, 3]], [0.5, 1], None, "as many values for each example"),
        ([0.5, np.nan], None, None, "must be finite"),
        (["a"], None, "values", "one or several numbers"),
        (np.zeros((2, 2, 2)), None, None, "one class number for each example"),
        ([0.5, 1.0], None, "classes", "must hold integer class numbers"),
    ],
)
def test_wrong_labels_are_named(train, test, kind, said):
    with pytest.raises(DataError, match=said) as error:
        targets(train, test, kind)
    assert "f.npz" in str(error.value)


def test_unknown_kind_and_kinds_that_named_data_do_not_have_are_refused():
    with pytest.raises(InvalidArgumentError, match="kind must be one of classes, binary, values"):
        targets([0, 1], kind="words")
    with pytest.raises(DataError, match="'mnist' has classes"):
        load("mnist", kind="values")


def test_npz_of_another_kind_is_loaded(tmp_path):
    x = np.zeros((4, 2), "float32")
    names = np.array(["no", "yes", "no", "yes"])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=names, x_test=x, y_test=names)
    found = load(tmp_path / "a.npz")
    assert (found.kind, found.num_classes, found.labels) == ("classes", 2, ("no", "yes"))
    y = np.arange(8).reshape(4, 2) / 2
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(DataError, match="one class number for each example"):
        load(tmp_path / "b.npz")
    found = load(tmp_path / "b.npz", kind=None)
    assert (found.kind, found.num_classes) == ("values", 2)
