"""The float32 twin of a network in half precision: the same weights, other arithmetic.

A network trained in ``mixed_float16`` or ``mixed_bfloat16`` has float32 weights and computes in
half precision, for which a ``.tflite`` file has no built-in operations. Its twin has copies of its
layers with the policy ``float32`` and the same weights. The two differ by what half precision
rounds off.

| dtype | rounding unit u |
| --- | --- |
| float16 | 2^-11 |
| bfloat16 | 2^-8 |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import keras
from keras import ops

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.export.serving import layers_within
from tf_kfacprune.graph import Call, fresh_operation, trace
from tf_kfacprune.tfmot.legacy import is_legacy_model

__all__ = ["ROUNDING_UNITS", "float32_twin", "half_dtypes"]

ROUNDING_UNITS = MappingProxyType({"float16": 2.0**-11, "bfloat16": 2.0**-8})

_POLICIES = (*ROUNDING_UNITS, *(f"mixed_{dtype}" for dtype in ROUNDING_UNITS))


def half_dtypes(layer: keras.layers.Layer) -> set[str]:
    """The half precision dtypes that a layer, or a layer within it, computes in."""
    found = {getattr(part, "compute_dtype", None) for part in layers_within(layer)}
    return {dtype for dtype in ROUNDING_UNITS if dtype in found}


def float32_twin(model: keras.Model) -> keras.Model:
    """The same network in float32.

    Args:
        model: a built Sequential or Functional model. It stays as it is.

    Returns:
        A flat Functional model with the inputs and outputs of ``model``, in float32, and copies of
        its weights; ``model`` itself if nothing in it is in half precision.

    Raises:
        UnsupportedModelError: if a layer in half precision cannot be built anew.
    """
    if is_legacy_model(model) or not half_dtypes(model):
        return model
    with _float32_by_default():
        return trace(model).rebuild(_Replay(), new_input=_widened_input)


class _Replay:
    """Executes calls on symbolic tensors with float32 copies of layers and operations."""

    def __init__(self) -> None:
        self._copies: dict[Any, Any] = {}
        self._names: set[str] = set()

    def __call__(self, call: Call, args: Any, kwargs: Any) -> Any:
        operation = call.operation
        if operation in self._copies:
            return self._copies[operation](*args, **kwargs)
        copy = self._copies[operation] = self._copy(call)
        outputs = copy(*args, **kwargs)
        if call.is_layer and copy is not operation:
            _copy_weights(call, copy)
        return outputs

    def _copy(self, call: Call) -> Any:
        operation, name = call.operation, self._free_name(call)
        if not call.is_layer:
            return _widened_operation(operation, name)
        if hasattr(operation, "adapt") and not operation.weights:
            return operation  # a lookup table, whose contents are in no config
        if type(operation) is keras.layers.Lambda:
            # Keras builds none from a config: that would run code from wherever it comes from.
            return keras.layers.Lambda(
                operation.function,
                mask=operation.mask,
                arguments=operation.arguments,
                name=name,
                dtype="float32",
            )
        try:
            return type(operation).from_config({**_widened(operation.get_config()), "name": name})
        except (NotImplementedError, TypeError, ValueError) as error:
            if not half_dtypes(operation):
                return operation
            raise UnsupportedModelError(
                f"Layer {call.path!r} ({type(operation).__name__}) computes in half precision and "
                f"cannot be built anew in float32 from its config: {_brief(error)} Fix its "
                "get_config, or build the network under keras.config.set_dtype_policy('float32'), "
                "set its weights to those of the trained one, and export that."
            ) from error

    def _free_name(self, call: Call) -> str:
        """Names within nested models may repeat; in a flat model each is there once."""
        path = call.path.replace("/", "_")
        name, number = call.operation.name, 0
        while name in self._names:
            name = f"{path}_{number}" if number else path
            number += 1
        self._names.add(name)
        return name


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:200]}..." if len(text) > 200 else f"{text.rstrip('.')}."


def _widened(config: Any) -> Any:
    """A config, or a part of one, with every half precision policy and dtype as float32."""
    if isinstance(config, list | tuple):
        return type(config)(_widened(part) for part in config)
    if not isinstance(config, dict):
        return config
    if "DTypePolicy" in str(config.get("class_name")):
        policy = keras.dtype_policies.deserialize(config)
        is_half = getattr(policy, "compute_dtype", None) in ROUNDING_UNITS
        return "float32" if is_half and policy.quantization_mode is None else config
    return {
        key: "float32" if key == "dtype" and value in _POLICIES else _widened(value)
        for key, value in config.items()
    }


def _widened_operation(operation: Any, name: str) -> Any:
    """A copy of a stateless operation; a cast to half precision becomes one to float32."""
    copy = fresh_operation(operation, name)
    for attribute, value in vars(copy).items():
        if isinstance(value, str) and value in ROUNDING_UNITS:
            setattr(copy, attribute, "float32")
    return copy


def _widened_input(tensor: Any) -> Any:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.Input(
        batch_shape=tensor.shape,
        dtype="float32" if dtype in ROUNDING_UNITS else dtype,
        name=tensor.name,
    )


def _copy_weights(call: Call, copy: Any) -> None:
    """Copies the weights of a layer. The classes are the same, so their order is."""
    old, new = call.operation.weights, copy.weights
    found, built = ([(w.name, tuple(w.shape)) for w in weights] for weights in (old, new))
    if found != built:
        raise UnsupportedModelError(
            f"Layer {call.path!r} ({type(copy).__name__}) cannot be built anew in float32: it has "
            f"weights {found}, the copy built from its config {built}. Fix its get_config."
        )
    for source, target in zip(old, new, strict=True):
        target.assign(ops.cast(ops.convert_to_tensor(source), target.dtype))
    if hasattr(copy, "finalize_state"):
        copy.finalize_state()


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Layers that make layers of their own give them the policy of the process."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
