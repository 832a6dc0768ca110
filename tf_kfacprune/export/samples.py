"""Inputs that an exported file is calibrated with and checked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from tf_kfacprune.errors import DataError, InvalidArgumentError
from tf_kfacprune.export.serving import Signature
from tf_kfacprune.export.text import TEXT, are_strings, as_bytes

__all__ = [
    "MAX_EXAMPLES",
    "MAX_LABELLED_EXAMPLES",
    "Examples",
    "Named",
    "labelled_examples",
    "named_examples",
    "random_examples",
]

Named = dict[str, np.ndarray]

# Examples that one check looks at; more would only make it slower.
MAX_EXAMPLES = 256
# One example of these is 0.01 points of accuracy.
MAX_LABELLED_EXAMPLES = 10_000


@dataclass(frozen=True)
class Examples:
    """What a file is run on.

    Attributes:
        inputs: arrays by input name, batch axis first.
        labels: the class of each example, shape ``(n,)``; None if unknown.
    """

    inputs: Named
    labels: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))


def random_examples(signature: Signature, count: int = 16) -> Named:
    """Standard normal inputs (0 or 1 for integers), the same at every call.

    Raises:
        InvalidArgumentError: if an input takes text, or has a free size besides the batch.
    """
    rng = np.random.default_rng(0)
    examples: Named = {}
    for name, (shape, dtype) in signature.inputs.items():
        if dtype == TEXT:
            raise InvalidArgumentError(
                f"Input {name!r} takes text, which cannot be guessed. Pass strings to check what "
                "is written on as verify_data, or verify=False."
            )
        sizes = [size for size in shape[1:] if size is not None]
        if len(sizes) < len(shape) - 1:
            raise InvalidArgumentError(
                f"Input {name!r} has shape {shape}: its free sizes cannot be guessed. Pass inputs "
                "to check the file on as verify_data."
            )
        if "float" in dtype:
            examples[name] = rng.standard_normal((count, *sizes))
        else:
            examples[name] = rng.integers(0, 2, (count, *sizes))
    return _as_declared(examples, signature)


def named_examples(data: Any, signature: Signature, argument: str) -> Named:
    """The first `MAX_EXAMPLES` examples of ``data``, checked, by input name.

    Args:
        data: an array (one input), a list or tuple of arrays in the model's order, a dictionary
            by input name, a ``tf.data.Dataset`` of batches of these, any other iterable of
            batches, or a function without arguments that returns one. Of ``(x, y)`` pairs, x is
            taken. Where an input takes text, strings stand for numbers; a list of strings is one
            array.
        signature: the model's inputs.
        argument: name of the argument, for messages.

    Returns:
        Arrays with the model's dtypes, text as bytes, batch axis first.

    Raises:
        DataError: if the data are empty, not finite, or do not fit the model's inputs.
    """
    return _collected(data, signature, argument, MAX_EXAMPLES).inputs


def labelled_examples(data: Any, signature: Signature, argument: str) -> Examples:
    """The first examples of ``data``, with their labels if it is one or more ``(x, y)`` pairs.

    Whole numbers of shape ``(n,)`` or ``(n, 1)`` are classes, and so are rows that sum to one, by
    their largest entry; others, such as the targets of a regression, are left out. Of unlabelled
    data `MAX_EXAMPLES` are taken, of labelled ones `MAX_LABELLED_EXAMPLES`.

    Raises:
        DataError: as for `named_examples`, and if labels and inputs differ in number.
    """
    examples = _collected(data, signature, argument, MAX_LABELLED_EXAMPLES)
    if examples.labels is not None:
        return examples
    return Examples({name: values[:MAX_EXAMPLES] for name, values in examples.inputs.items()})


def _collected(data: Any, signature: Signature, argument: str, limit: int) -> Examples:
    taken: list[Named] = []
    labels: list[np.ndarray] = []
    count = 0
    for named, batch_labels in _batches(data, signature, argument):
        taken.append(named)
        count += len(next(iter(named.values())))
        if batch_labels is not None:
            labels.append(batch_labels)
        # Without labels a few examples do; a generator is not read further than needed.
        if count >= (limit if len(labels) == len(taken) else MAX_EXAMPLES):
            break
    inputs = {
        name: np.concatenate([batch[name] for batch in taken])[:limit] for name in signature.inputs
    }
    if len(labels) < len(taken):
        return Examples(inputs)
    return Examples(inputs, np.concatenate(labels)[:limit])


def _batches(
    data: Any, signature: Signature, argument: str
) -> Iterator[tuple[Named, np.ndarray | None]]:
    """Yields checked batches of ``data`` and their labels."""
    if callable(data) and not hasattr(data, "__array__") and not isinstance(data, Iterable):
        data = data()
    batches: Iterable[Any]
    if isinstance(data, np.ndarray | Mapping | list | tuple) or hasattr(data, "__array__"):
        batches = [data]
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
        batches = data
    else:
        raise DataError(
            f"{argument} must be an array, a list or dictionary of arrays, or an iterable of "
            f"batches. Received: {type(data).__name__}."
        )
    found = False
    for batch in islice(batches, MAX_LABELLED_EXAMPLES):
        found = True
        named, labels = _named(batch, signature, argument)
        checked = _checked(named, signature, argument)
        yield checked, _class_labels(labels, len(next(iter(checked.values()))), argument)
    if not found:
        raise DataError(f"{argument} is empty. Pass at least one example.")


def _class_labels(labels: Any, count: int, argument: str) -> np.ndarray | None:
    """Labels of one batch as integers of shape ``(n,)``; None if they are no classes."""
    if labels is None or not hasattr(labels, "__len__"):
        return None
    array = np.asarray(labels)
    if array.dtype.kind not in "biuf" or array.ndim not in (1, 2) or not array.size:
        return None
    if len(array) != count:
        raise DataError(f"{argument} has {len(array)} labels for {count} inputs.")
    if array.ndim == 2 and array.shape[1] > 1:  # one-hot, perhaps smoothed
        is_share = (array >= 0).all() and np.allclose(array.sum(axis=1), 1.0, atol=1e-3)
        return array.argmax(axis=1) if is_share else None
    array = array.reshape(-1)
    return array.astype(np.int64) if (array == np.round(array)).all() else None


def _named(batch: Any, signature: Signature, argument: str) -> tuple[Named, Any]:
    """One batch by input name, and its labels if it is an ``(x, y)`` pair."""
    names = list(signature.inputs)
    if isinstance(batch, Mapping):
        if set(batch) != set(names):
            raise DataError(
                f"{argument} must have the model's inputs {names} as keys. Found {list(batch)}."
            )
        return {name: np.asarray(batch[name]) for name in names}, None
    if isinstance(batch, list | tuple) and not (are_strings(batch) and len(names) == 1):
        if len(batch) == 2 and isinstance(batch[0], Mapping | list | tuple):
            return _named(batch[0], signature, argument)[0], batch[1]  # (inputs, labels)
        if len(batch) == len(names):
            return {name: np.asarray(a) for name, a in zip(names, batch, strict=True)}, None
        if len(batch) == len(names) + 1 == 2:
            return {names[0]: np.asarray(batch[0])}, batch[1]  # (x, y)
        raise DataError(
            f"{argument} must have one array for each of the model's inputs {names}. Found "
            f"{len(batch)}."
        )
    if len(names) != 1:
        raise DataError(
            f"{argument} must be a dictionary of arrays, because the model has inputs {names}. "
            "Found a single array."
        )
    return {names[0]: np.asarray(batch)}, None


def _checked(named: Named, signature: Signature, argument: str) -> Named:
    checked: Named = {}
    for name, array in named.items():
        shape, dtype = signature.inputs[name]
        where = f"{argument} for input {name!r}"
        if dtype == TEXT and array.ndim == 1 and shape[1:] == (1,):
            array = array[:, None]  # n strings, as Keras takes them too
        fits = array.ndim == len(shape) and all(
            expected in (None, size)
            for expected, size in zip(shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            raise DataError(
                f"{where} must have shape {('n', *shape[1:])}. Found {array.shape}. Keep the batch "
                "axis, also for a single example."
            )
        if len(array) == 0:
            raise DataError(f"{where} is empty. Pass at least one example.")
        checked[name] = as_bytes(array, where) if dtype == TEXT else _finite(array, where)
    counts = {name: len(array) for name, array in checked.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{argument} must have one number of examples. Found {counts}.")
    return _as_declared(checked, signature)


def _finite(array: np.ndarray, where: str) -> np.ndarray:
    """The array, which must hold finite numbers."""
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise DataError(f"{where} must hold numbers. Found {array.dtype}.")
    if not np.isfinite(array).all():
        raise DataError(
            f"{where} must be finite. Found NaN or infinite values. Remove these examples."
        )
    return array


def _as_declared(named: Named, signature: Signature) -> Named:
    """Arrays in the dtypes that the model's inputs declare; text stays bytes."""
    dtypes = {name: dtype for name, (_, dtype) in signature.inputs.items()}
    return {
        name: array if dtypes[name] == TEXT else array.astype(dtypes[name])
        for name, array in named.items()
    }
