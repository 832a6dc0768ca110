"""Proves on data that the compact model computes what the gated model computes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from tf_kfacprune.errors import InvalidArgumentError, ParityError

__all__ = ["default_tolerance", "parity_error", "random_inputs", "verify_parity"]

# Largest relative difference that rounding explains, by the coarsest type that layers compute in.
_TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
_MAX_ELEMENTS = 2**21  # per random batch
_UNKNOWN_LENGTH, _UNKNOWN_IMAGE_SIZE = 16, 64  # stand-ins for axes of unknown size


def default_tolerance(model: keras.Model) -> float:
    """The relative error that rounding explains, given the types that a model computes in."""
    dtypes = {layer.compute_dtype for layer in model.layers}
    return max([_TOLERANCES["float32"], *(_TOLERANCES.get(dtype, 0.0) for dtype in dtypes)])


def random_inputs(model: keras.Model, batch_size: int = 8, seed: int = 0) -> Any:
    """Random inputs in the structure of a model's inputs.

    Floating-point inputs are standard normal, integers and booleans are 0 or 1.

    Args:
        model: The model.
        batch_size: Number of examples, fewer for large inputs.
        seed: Seed of the random numbers.

    Returns:
        NumPy arrays in the structure of the model's inputs.

    Raises:
        InvalidArgumentError: If an input is neither numeric nor boolean.
    """
    rng = np.random.default_rng(seed)
    elements = sum(_elements(tensor) for tensor in model.inputs)
    batch = max(1, min(batch_size, _MAX_ELEMENTS // elements))

    def draw(tensor: Any) -> np.ndarray:
        shape = (tensor.shape[0] or batch, *_sizes(tensor))
        if tensor.dtype.startswith(("float", "bfloat")):
            return rng.standard_normal(shape).astype("float32")
        if tensor.dtype == "bool" or "int" in tensor.dtype:
            return rng.integers(0, 2, shape).astype(tensor.dtype)
        raise InvalidArgumentError(
            f"No random data for input {tensor.name!r} of type {tensor.dtype}. Pass real inputs as "
            "`verify_data`."
        )

    single = isinstance(model, keras.Sequential)  # `input` is undefined until it is called
    return tree.map_structure(draw, model.inputs[0] if single else model.input)


def parity_error(reference: Any, other: Any) -> float:
    """Largest difference of two structures of outputs, relative to each output's largest value."""
    worst = 0.0
    for a, b in zip(tree.flatten(reference), tree.flatten(other), strict=True):
        a, b = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (a, b))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if same.all():
            continue
        scale = np.abs(a).max()
        error = np.abs(np.where(same, 0, a - b)).max() / (scale if scale > 0 else 1.0)
        worst = max(worst, float(error)) if np.isfinite(error) else float("inf")
    return worst


def verify_parity(
    gated: keras.Model,
    compact: keras.Model,
    tolerance: float | None = None,
    data: Any = None,
) -> float:
    """Compares two models in inference mode.

    Args:
        gated: The reference.
        compact: The model that must equal it.
        tolerance: Largest relative error allowed; by the models' types if None.
        data: Inputs in the structure of the model's inputs; random ones if None.

    Returns:
        The relative error found.

    Raises:
        ParityError: If the error is larger than the tolerance.
    """
    tolerance = default_tolerance(gated) if tolerance is None else tolerance
    inputs = random_inputs(compact) if data is None else tree.map_structure(_tensor, data)
    error = parity_error(gated(inputs, training=False), compact(inputs, training=False))
    if not error <= tolerance:
        sensitivity = _rounding_sensitivity(gated, inputs)
        source = "random inputs" if data is None else "`verify_data`"
        raise ParityError(
            f"The compact model differs from the gated model {gated.name!r} on {source}: relative "
            f"error {error:.2e}, allowed {tolerance:.2e}. Rounding the inputs alone changes the "
            f"outputs by {sensitivity:.1e}: if that is of the order of the error, the network "
            "amplifies rounding; pass real inputs as `verify_data` or a larger `tolerance`. "
            "Otherwise a layer does not do what its channel rule says; please report "
            "the architecture."
        )
    return error


def _tensor(leaf: Any) -> Any:
    return tf.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf


def _rounding_sensitivity(model: keras.Model, inputs: Any) -> float:
    """Relative change of the outputs when floating-point inputs change by one rounding unit."""

    def nudge(x: Any) -> Any:
        x = np.asarray(x)
        return x * (1 + np.finfo("float32").eps) if x.dtype.kind == "f" else x

    nudged = tree.map_structure(nudge, inputs)
    return parity_error(model(inputs, training=False), model(nudged, training=False))


def _sizes(tensor: Any) -> list[int]:
    stand_in = _UNKNOWN_IMAGE_SIZE if len(tensor.shape) > 3 else _UNKNOWN_LENGTH
    return [stand_in if size is None else size for size in tensor.shape[1:]]


def _elements(tensor: Any) -> int:
    return int(np.prod(_sizes(tensor)))
