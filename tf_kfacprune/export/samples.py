"""Inputs that an exported file is calibrated with and checked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from tf_kfacprune.errors import DataError, InvalidArgumentError
from tf_kfacprune.export.serving import Signature

__all__ = ["MAX_EXAMPLES", "named_batches", "named_examples", "random_examples"]

Named = dict[str, np.ndarray]

# Examples that one check looks at; more would only make it slower.
MAX_EXAMPLES = 256


def random_examples(signature: Signature, count: int = 16) -> Named:
    """Standard normal inputs (0 or 1 for integers), the same at every call.

    Raises:
        InvalidArgumentError: if an input has a free size besides the batch.
    """
    rng = np.random.default_rng(0)
    examples: Named = {}
    for name, (shape, dtype) in signature.inputs.items():
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
            by input name, a ``tf.data.Dataset`` of batches of these, or any other iterable of
            batches. Of ``(x, y)`` pairs in a dataset of batches, x is taken.
        signature: the model's inputs.
        argument: name of the argument, for messages.

    Returns:
        Arrays with the model's dtypes, batch axis first.

    Raises:
        DataError: if the data are empty, not finite, or do not fit the model's inputs.
    """
    taken: list[Named] = []
    count = 0
    for batch in named_batches(data, signature, argument):
        taken.append(batch)
        count += len(next(iter(batch.values())))
        if count >= MAX_EXAMPLES:
            break
    return {
        name: np.concatenate([batch[name] for batch in taken])[:MAX_EXAMPLES]
        for name in signature.inputs
    }


def named_batches(data: Any, signature: Signature, argument: str) -> Iterator[Named]:
    """Yields checked batches of ``data``; arguments and errors as for `named_examples`."""
    batches: Iterable[Any]
    if isinstance(data, np.ndarray | Mapping | list | tuple) or hasattr(data, "__array__"):
        batches = [data]
    elif isinstance(data, Iterable):
        batches = data
    else:
        raise DataError(
            f"{argument} must be an array, a list or dictionary of arrays, or an iterable of "
            f"batches. Received: {type(data).__name__}."
        )
    found = False
    for batch in islice(batches, MAX_EXAMPLES):
        found = True
        yield _checked(_named(batch, signature, argument), signature, argument)
    if not found:
        raise DataError(f"{argument} is empty. Pass at least one example.")


def _named(batch: Any, signature: Signature, argument: str) -> Named:
    names = list(signature.inputs)
    if isinstance(batch, Mapping):
        if set(batch) != set(names):
            raise DataError(
                f"{argument} must have the model's inputs {names} as keys. Found {list(batch)}."
            )
        return {name: np.asarray(batch[name]) for name in names}
    if isinstance(batch, list | tuple):
        if len(batch) == 2 and isinstance(batch[0], Mapping | list | tuple):
            return _named(batch[0], signature, argument)  # (inputs, labels)
        if len(batch) == len(names):
            return {name: np.asarray(a) for name, a in zip(names, batch, strict=True)}
        if len(batch) == len(names) + 1 == 2:
            return {names[0]: np.asarray(batch[0])}  # (x, y): the labels are not needed
        raise DataError(
            f"{argument} must have one array for each of the model's inputs {names}. Found "
            f"{len(batch)}."
        )
    if len(names) != 1:
        raise DataError(
            f"{argument} must be a dictionary of arrays, because the model has inputs {names}. "
            "Found a single array."
        )
    return {names[0]: np.asarray(batch)}


def _checked(named: Named, signature: Signature, argument: str) -> Named:
    for name, array in named.items():
        shape, _ = signature.inputs[name]
        where = f"{argument} for input {name!r}"
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
        if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
            raise DataError(f"{where} must hold numbers. Found {array.dtype}.")
        if not np.isfinite(array).all():
            raise DataError(
                f"{where} must be finite. Found NaN or infinite values. Remove these examples."
            )
    counts = {name: len(array) for name, array in named.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{argument} must have one number of examples. Found {counts}.")
    return _as_declared(named, signature)


def _as_declared(named: Named, signature: Signature) -> Named:
    """Arrays in the dtypes that the model's inputs declare."""
    return {name: array.astype(signature.inputs[name][1]) for name, array in named.items()}
