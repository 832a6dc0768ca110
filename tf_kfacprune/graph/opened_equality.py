"""Compares the recorded inside of a layer's call with the layer itself, on random numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from tf_kfacprune.graph.keras_internals import mask_of, set_mask
from tf_kfacprune.graph.recording import Recording
from tf_kfacprune.graph.walk import Opened

__all__ = ["is_noise", "why_different"]

# Of random inputs: their number, the number where it must be that of windows in images, stand-ins
# for axes of unknown size.
_BATCH, _WINDOWS, _SIZES = 3, 64, (6, 32)
# What another order of summation may cause, relative to the largest value, by element type.
_TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}

UNCHECKED = "it cannot be called on random inputs, to check what was recorded of its call: {}"
FAILS = "what was recorded of its call does not run: {}"
DIFFERS = "what was recorded of its call computes something else {}: {:.1e} apart"


def why_different(recording: Recording, opened: Opened) -> str | None:
    """Why what was recorded is not the same function as the layer, or None if it is.

    Both are run in inference and in training mode from the same state, with weights that differ
    from those at the time of the recording. The outputs are compared, and the state afterwards
    (moving statistics, seeds). All weights are put back.

    Args:
        recording: The recorded call.
        opened: What was recorded.

    Returns:
        The reason, or None.
    """
    layer = _Checked(recording.call)
    function = _Checked(opened.function)
    count = len(opened.function.outputs) - len(opened.masked)
    variables = _all_variables(recording.layer)
    with _put_back(variables):
        _change(variables)
        try:
            tensors = _inputs_that_fit(recording, layer, variables)
        except Exception as error:  # noqa: BLE001 (whatever a user's own code raises)
            return UNCHECKED.format(describe_error(error))
        for training in (False, True):
            start = _values(variables)
            expected = tree.flatten(layer(tensors, training=training))[:count]
            expected += _values(variables)
            _assign(variables, start)
            masks = [mask_of(tensor) for tensor in tensors if mask_of(tensor) is not None]
            try:
                found = tree.flatten(function([*tensors, *masks], training=training))[:count]
            except Exception as error:  # noqa: BLE001 (a size that was not recorded)
                return FAILS.format(describe_error(error))
            found += _values(variables)
            worst = max(map(_difference, expected, found), default=0.0)
            if worst > 0:
                return DIFFERS.format("in training" if training else "in inference", worst)
    return None


def is_noise(recording: Recording, opened: Opened) -> bool:
    """Whether a layer acts as `Dropout` does.

    In inference it hands on its input; in training, from the same seeds, no entry of its output
    depends on another entry of its input (checked on random numbers).

    Args:
        recording: The recorded call.
        opened: What was recorded in inference.

    Returns:
        Whether it does.
    """
    variables = _all_variables(recording.layer)
    own_seeds = all("seed" in variable.name for variable in variables)
    if not (recording.takes_training and len(recording.inputs) == 1 and own_seeds):
        return False
    if len(opened.function.outputs) != 1 or opened.function.outputs[0] is not recording.inputs[0]:
        return False
    layer = _Checked(recording.call)
    with _put_back(variables):
        start = _values(variables)
        try:
            (tensor,) = _inputs_that_fit(recording, layer, variables)
            changed = np.random.default_rng(0).random(tensor.shape) < 0.5
            other = tensor + ops.cast(changed, tensor.dtype)
            results = []
            for given in (tensor, other):
                _assign(variables, start)
                results.append(ops.convert_to_numpy(layer([given], training=True)))
        except Exception:  # noqa: BLE001 (whatever a user's own code raises)
            return False
    first, second = results
    return first.shape == tensor.shape and bool((first == second)[~changed].all())


def describe_error(error: Exception) -> str:
    """The kind of an error and the first lines of what it says, on one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("Arguments received by")[0]
    text = " ".join(re.sub(r"^Exception encountered when calling \S+", "", text).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


class _Checked(keras.layers.Layer):
    """Runs a function such that the layers in it take `training` from this call."""

    def __init__(self, function: Any) -> None:
        super().__init__(autocast=False)
        self.__dict__["_function"] = function  # not a part of this layer, to Keras
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        del training  # the layers inside find it in the context of the call
        return self._function(inputs)


def _inputs_that_fit(
    recording: Recording, layer: Any, variables: Sequence[keras.Variable]
) -> list[Any]:
    """Random inputs on which the layer can be called."""
    start = _values(variables)
    attempts = _attempts(variables)
    for number, attempt in enumerate(attempts, start=1):
        rng = np.random.default_rng(0)
        tensors = [_draw(rng, tensor, *attempt) for tensor in recording.inputs]
        masks = iter([_draw(rng, mask, *attempt) for mask in recording.masks])
        for tensor, is_masked in zip(tensors, recording.is_masked, strict=True):
            if is_masked:
                set_mask(tensor, next(masks))
        try:
            layer(tensors, training=False)
        except Exception:
            if number == len(attempts):
                raise
            continue
        finally:
            _assign(variables, start)
        break
    return tensors


def _attempts(variables: Sequence[keras.Variable]) -> list[tuple[int, int, bool]]:
    """What unknown sizes may be: batch, size, whether tensors are stacked before their batch axis.

    Sizes of weights are tried, too: some layers take sequences of one length alone.
    """
    own = {size for variable in variables for size in variable.shape if 1 < size < 1000}
    sizes = [*_SIZES, *sorted(own - {*_SIZES})]
    stacked = [(_BATCH, size, stacked) for size in sizes for stacked in (False, True)]
    return [*stacked, (_WINDOWS, _SIZES[0], False)]


def _draw(rng: np.random.Generator, tensor: Any, batch: int, size: int, stacked: bool) -> Any:
    shape = list(tensor.shape)
    if None in shape and (stacked or shape[0] is None):
        shape[shape.index(None)] = batch
    shape = [size if n is None else n for n in shape]
    if "float" in tensor.dtype:
        array = rng.standard_normal(shape)
    else:
        array = rng.integers(0, 2, shape).astype("float64")
        array[..., :1] = 1  # something is not masked
    return ops.convert_to_tensor(array.astype("float32"), dtype=tensor.dtype)


def _difference(expected: Any, found: Any) -> float:
    """Largest difference relative to the largest value; 0 within rounding."""
    dtype = keras.backend.standardize_dtype(expected.dtype)
    a, b = (ops.convert_to_numpy(x).astype("float64") for x in (expected, found))
    if a.shape != b.shape or keras.backend.standardize_dtype(found.dtype) != dtype:
        return float("inf")
    a, b = (
        np.where(np.isfinite(x), x, np.nan_to_num(x, posinf=1e300, neginf=-1e300)) for x in (a, b)
    )
    scale = np.abs(a).max(initial=0.0) or 1.0
    error = float(np.abs(a - b).max(initial=0.0) / scale)
    return 0.0 if error <= _TOLERANCES.get(dtype, 0.0) else error


def _all_variables(layer: keras.Layer) -> list[keras.Variable]:
    return list({id(v): v for v in layer.variables}.values())


@contextmanager
def _put_back(variables: Sequence[keras.Variable]) -> Iterator[None]:
    start = _values(variables)
    try:
        yield
    finally:
        _assign(variables, start)


def _values(variables: Sequence[keras.Variable]) -> list[Any]:
    return [ops.convert_to_numpy(v.value) for v in variables]


def _assign(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _change(variables: Sequence[keras.Variable]) -> None:
    """Random changes that leave variances positive; of whole numbers, only seeds are changed."""
    rng = np.random.default_rng(1)
    for variable in variables:
        value = ops.convert_to_numpy(variable.value)
        if "float" in variable.dtype:
            factor, summand = rng.uniform(0.5, 1.5, value.shape), rng.uniform(0, 0.1, value.shape)
            variable.assign((value * factor + summand).astype(value.dtype))
        elif "seed" in variable.name:
            variable.assign(value + np.asarray(rng.integers(1, 99, value.shape), value.dtype))
