"""What the examples are labelled with: classes, decisions or values, checked once.

| kind | stored as | becomes |
| --- | --- | --- |
| `"classes"` | integers from 0 up or text, one for each example | int64, shape `(n,)` |
| `"binary"` | 0 or 1, one or several for each example, of any type | float32, shape `(n, k)` |
| `"values"` | numbers, one or several for each example | float32, shape `(n, k)` |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tf_kfacprune.errors import DataError, InvalidArgumentError

__all__ = ["KINDS", "Targets", "checked_targets"]

KINDS = ("classes", "binary", "values")


@dataclass(frozen=True)
class Targets:
    """Labels of a data set, in the form that a loss takes.

    Attributes:
        kind: one of `KINDS`.
        train: labels of the training examples; shapes and dtypes are in the table of this file.
        test: labels of the test examples.
        outputs: number of classes, or of decisions or values for each example.
        names: names of the classes; empty if they are numbers.
    """

    kind: str
    train: np.ndarray
    test: np.ndarray
    outputs: int
    names: tuple[str, ...] = ()


def checked_targets(
    train: np.ndarray,
    test: np.ndarray,
    *,
    source: str,
    kind: str | None = "classes",
    num_classes: int | None = None,
) -> Targets:
    """Labels in the form of their kind, or an error that says what is wrong with them.

    Args:
        train: the array ``y_train``.
        test: the array ``y_test``.
        source: where the arrays come from, for messages.
        kind: one of `KINDS`, or None for what the training labels look like: text and a column of
            integers or booleans are classes; floats, or several numbers for each example, are
            decisions if all of them are 0 or 1, else values.
        num_classes: number of classes; by default one more than the largest training label.

    Returns:
        The labels.

    Raises:
        InvalidArgumentError: if ``kind`` is unknown.
        DataError: naming the source, the array, what was found and the remedy.
    """
    if kind is None:
        kind = _looks_like(train, f"{source}: 'y_train'")
    if kind not in KINDS:
        raise InvalidArgumentError(
            f"kind must be one of {', '.join(KINDS)}, or None. Received: kind={kind!r}."
        )
    arrays = {"y_train": train, "y_test": test}
    if kind != "classes":
        numbers = {key: _numbers(array, f"{source}: {key!r}") for key, array in arrays.items()}
        if numbers["y_train"].shape[1] != numbers["y_test"].shape[1]:
            raise DataError(
                f"{source}: 'y_train' and 'y_test' must hold as many values for each example. "
                f"Found {numbers['y_train'].shape[1]} and {numbers['y_test'].shape[1]}."
            )
        if kind == "binary":
            for key, array in numbers.items():
                _check_binary(array, f"{source}: {key!r}")
        outputs = numbers["y_train"].shape[1]
        return Targets(kind, numbers["y_train"], numbers["y_test"], outputs)
    names: tuple[str, ...] = ()
    if _is_text(train) or _is_text(test):
        arrays, names = _numbered(arrays, source)
    classes = {key: _classes(array, key, source) for key, array in arrays.items()}
    count = len(names) or int(classes["y_train"].max()) + 1
    if num_classes is not None:
        count = num_classes
    for key, array in classes.items():
        highest = int(array.max())
        if highest >= count:
            raise DataError(
                f"{source}: {key!r} must hold labels from 0 to {count - 1} ({count} classes"
                + ("" if num_classes is not None else ", counted from the training labels")
                + f"). Found label {highest}. Renumber the labels or remove these examples."
            )
    return Targets(kind, classes["y_train"], classes["y_test"], count, names)


def _looks_like(array: np.ndarray, where: str) -> str:
    one_each = array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)
    if _is_text(array) or not array.size or (one_each and array.dtype.kind in "iub"):
        return "classes"
    if not (array.dtype.kind in "iubf" and array.ndim in (1, 2)):
        return "classes"  # which says what is wrong
    if not np.isin(array, (0, 1)).all():
        return "values"
    if array.ndim == 2 and array.shape[1] > 1 and (array.sum(axis=1) == 1).all():
        raise DataError(
            f"{where} has shape {array.shape} and a single 1 in every row, which looks like "
            "one-hot classes. Turn them into class numbers with y.argmax(axis=1), or say that "
            "they are decisions of their own: kind='binary' (--loss=binary_crossentropy)."
        )
    return "binary"


def _is_text(array: np.ndarray) -> bool:
    return array.dtype.kind in "US"


def _numbered(
    arrays: dict[str, np.ndarray], source: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Names of classes as numbers, in the alphabetical order of the training labels."""
    texts = {}
    for key, array in arrays.items():
        if not _is_text(array):
            raise DataError(
                f"{source}: 'y_train' and 'y_test' must both hold names of classes, or both class "
                f"numbers. Found {key!r} of {array.dtype}."
            )
        try:
            texts[key] = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: {key!r} must hold text in UTF-8: {error}.") from error
    names = np.unique(texts["y_train"])
    unknown = np.setdiff1d(texts["y_test"], names)
    if len(unknown):
        raise DataError(
            f"{source}: 'y_test' holds the class {str(unknown[0])!r}, of which 'y_train' has no "
            f"example. Found {len(names)} classes in 'y_train': {', '.join(names[:10])}"
            + ("..." if len(names) > 10 else ".")
        )
    numbered = {key: np.searchsorted(names, text) for key, text in texts.items()}
    return numbered, tuple(str(name) for name in names)


def _classes(array: np.ndarray, key: str, source: str) -> np.ndarray:
    """int64 labels of shape (n,), not negative."""
    where = f"{source}: {key!r}"
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) == 0:
        remedy = (
            f" One-hot labels can be turned into class numbers with {key}.argmax(axis=1)."
            if array.ndim == 2 and array.shape[1] > 1
            else ""
        )
        raise DataError(
            f"{where} must hold one class number for each example, shape (n,) or (n, 1). "
            f"Found shape {array.shape}.{remedy}"
        )
    if array.dtype.kind not in "iub":
        raise DataError(
            f"{where} must hold integer class numbers. Found {array.dtype}. Convert it, for "
            f"example with {key}.astype('int64')."
        )
    lowest = int(array.min())
    if lowest < 0:
        raise DataError(
            f"{where} must hold class numbers from 0 up. Found label {lowest} at index "
            f"{int(array.argmin())}. Renumber the labels or remove these examples."
        )
    return array.astype(np.int64)


def _numbers(array: np.ndarray, where: str) -> np.ndarray:
    """float32 numbers of shape (n, k), finite."""
    if array.dtype.kind not in "iubf" or array.ndim not in (1, 2) or 0 in array.shape:
        raise DataError(
            f"{where} must hold one or several numbers for each example, shape (n,) or (n, k). "
            f"Found {array.dtype} of shape {array.shape}."
        )
    result = array.reshape(len(array), -1).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if len(bad):
        raise DataError(
            f"{where} must be finite. Found NaN or infinite values in {len(bad)} of {len(result)} "
            f"examples, the first at index {bad[0]}. Remove or repair these examples."
        )
    return result


def _check_binary(array: np.ndarray, where: str) -> None:
    other = array[(array != 0) & (array != 1)]
    if len(other):
        raise DataError(
            f"{where} must hold 0 or 1 for every decision. Found {other[0]:g} among "
            f"{array.size} of them. Classes and values of other kinds need another loss."
        )
