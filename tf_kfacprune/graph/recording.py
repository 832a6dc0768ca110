"""Runs the call of a layer on symbolic tensors, so that Keras records what it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops, tree

from tf_kfacprune.graph.rules.registry import has_rule
from tf_kfacprune.graph.rules.substitution import substituted
from tf_kfacprune.graph.symbolic_sizes import symbolic_sizes
from tf_kfacprune.graph.tensorflow_functions import expressed_by_keras
from tf_kfacprune.graph.tracer import (
    Opened,
    calls_of,
    calls_without_trailing_none,
    converted_dtype,
    in_mode,
    is_made_by_layer,
    make_dense,
    mask_of,
    set_mask,
    without_trailing_none,
)
from tf_kfacprune.graph.weight_layer import Weight

__all__ = ["Recording"]


class Recording:
    """A recorded call of a layer, to be made again.

    Attributes:
        layer: The layer.
        takes_training: Whether its `call` has an argument `training`.
        inputs: Symbolic inputs, one per tensor of the arguments, converted as the layer does.
        masks: Symbolic Keras masks of those inputs that carry one, in their order.
        is_masked: For each input whether it carries a mask.

    Args:
        layer: The layer.
        args: Positional arguments of the call, symbolic tensors and settings.
        kwargs: Keyword arguments, likewise.
        masks: For each symbolic tensor of the arguments its Keras mask, or None.
        trusts_shapes: Whether layers inside are asked for the shapes of what they return; if not,
            their `call` is run to see.
    """

    def __init__(
        self,
        layer: keras.Layer,
        args: Any,
        kwargs: dict[str, Any],
        masks: Sequence[Any],
        trusts_shapes: bool = True,
    ) -> None:
        self.layer = layer
        self.trusts_shapes = trusts_shapes
        self.takes_training = "training" in inspect.signature(layer.call).parameters
        self._arguments = (args, {k: v for k, v in kwargs.items() if k != "training"})
        tensors = [leaf for leaf in tree.flatten(self._arguments) if is_symbolic(leaf)]
        self.inputs = [_input(t.shape, converted_dtype(t.dtype, layer)) for t in tensors]
        self.masks: list[Any] = []
        self.is_masked = [mask is not None for mask in masks]
        for tensor, mask in zip(self.inputs, masks, strict=True):
            if mask is not None:
                self.masks.append(_input(mask.shape, mask.dtype))
                set_mask(tensor, self.masks[-1])

    def fill(self, tensors: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of the call with other tensors."""
        rest = iter(tensors)
        filled: tuple[Any, dict[str, Any]] = tree.map_structure(
            lambda leaf: next(rest) if is_symbolic(leaf) else leaf, self._arguments
        )
        return filled

    def call(self, tensors: Sequence[Any]) -> Any:
        """Calls the layer."""
        args, kwargs = self.fill(tensors)
        return self.layer(*args, **kwargs)

    def record(self, training: bool) -> Opened | None:
        """What the call does.

        Args:
            training: The mode.

        Returns:
            Its inside, or None if not all that it returns is computed from its inputs.
        """
        args, kwargs = self.fill(self.inputs)
        kwargs = {**kwargs, **self._missing_masks(args, kwargs)}
        if self.takes_training:
            kwargs["training"] = training
        place = self.inputs[0]
        with (
            _symbolic_weights(self.layer, place),
            symbolic_sizes(),
            expressed_by_keras(),
            _recorded_layers(self.layer, place, self.trusts_shapes),
            calls_without_trailing_none(),
            in_mode(self.layer, training),
        ):
            outputs = tree.flatten(self.layer.call(*args, **kwargs))
        outputs = [_symbolic_constant(tensor, place) for tensor in without_trailing_none(outputs)]
        if not outputs or not all(map(is_symbolic, outputs)):
            return None
        masked = tuple(
            number
            for number, tensor in enumerate(outputs)
            if mask_of(tensor) is not None and not is_made_by_layer(tensor)
        )
        set_inside = [mask_of(outputs[number]) for number in masked]
        function = keras.Function([*self.inputs, *self.masks], [*outputs, *set_inside])
        return Opened(function, masked)

    def depends_on_mode(self, opened: Opened) -> bool:
        """Whether what was recorded may be something else in the other mode."""
        _, calls, _ = calls_of(opened.function)
        return self.takes_training or any(c.kwargs.get("training") is not None for c in calls)

    def _missing_masks(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for masks that are left out, filled as `Layer.__call__` does."""
        bound = inspect.signature(self.layer.call).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        tensors = {name: value for name, value in given.items() if _is_of_tensors(value)}
        single = len(tensors) == 1
        named = {"mask" if single else f"{name}_mask": value for name, value in tensors.items()}
        return {
            name: tree.map_structure(mask_of, value)
            for name, value in named.items()
            if name in given and given[name] is None
        }


def is_symbolic(leaf: Any) -> bool:
    """Whether something is a symbolic tensor."""
    return isinstance(leaf, keras.KerasTensor)


def _is_of_tensors(value: Any) -> bool:
    leaves = tree.flatten(value)
    return any(map(is_symbolic, leaves)) and all(x is None or is_symbolic(x) for x in leaves)


def _input(shape: Sequence[int | None], dtype: str) -> keras.KerasTensor:
    return keras.Input(batch_shape=tuple(shape), dtype=dtype)


@contextmanager
def _symbolic_weights(layer: Any, place: keras.KerasTensor) -> Iterator[None]:
    """Puts symbolic tensors in place of a layer's own weights, so that reading them is recorded."""
    symbolic: dict[int, Any] = {}

    def stand_in(leaf: Any) -> Any:
        if not isinstance(leaf, keras.Variable):
            return leaf
        if id(leaf) not in symbolic:
            symbolic[id(leaf)] = Weight.around(leaf, leaf.name, layer.dtype_policy)(place)
        return symbolic[id(leaf)]

    attributes = {}
    for name, value in vars(layer).items():
        if name in _BOOKS or not isinstance(value, (keras.Variable, list, tuple, dict)):
            continue
        if any(isinstance(leaf, keras.Variable) for leaf in tree.flatten(value)):
            attributes[name] = tree.map_structure(stand_in, _plain(value))
    with substituted(layer, **attributes):
        yield


@contextmanager
def _recorded_layers(
    layer: keras.Layer, place: keras.KerasTensor, trusts_shapes: bool
) -> Iterator[None]:
    """Records what Keras would not.

    Layers with weights that are called on constants (an embedding of positions) would be run at
    once: the constants are made symbolic. Layers whose own inference of shapes does not know an
    argument of their `call`, or is not to be trusted, infer them from `call`. A weight of another
    layer that an operation reads is put into a `Weight` layer, as the layer's own are.
    """
    policy = layer.dtype_policy
    call, symbolic_call = keras.Layer.__call__, keras.Layer.symbolic_call
    operate = keras.Operation.symbolic_call
    owners: dict[int, Any] = {}
    depth = 0

    def recorded_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        leaves = tree.flatten((args, kwargs))
        if depth == 0 and not place.sparse:
            for leaf in filter(is_symbolic, leaves):
                make_dense(leaf)
        if depth == 0 and layer.weights and not any(map(is_symbolic, leaves)):
            args, kwargs = tree.map_structure(
                lambda leaf: _symbolic_constant(leaf, place), (args, kwargs)
            )
        depth += 1
        try:
            return call(layer, *args, **kwargs)
        finally:
            depth -= 1

    def inferred_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if trusts_shapes or has_rule(layer):
                return symbolic_call(layer, *args, **kwargs)
        except TypeError:
            pass
        return keras.Operation.compute_output_spec(layer, *args, **kwargs)

    def owned(leaf: Any) -> Any:
        if not isinstance(leaf, keras.Variable):
            return leaf
        if id(leaf) not in owners:
            owners[id(leaf)] = Weight.around(leaf, leaf.name, policy)(place)
        return owners[id(leaf)]

    def recorded_operation(operation: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree.map_structure(owned, (args, kwargs))
        return operate(operation, *args, **kwargs)

    keras.Layer.__call__, keras.Layer.symbolic_call = recorded_call, inferred_call
    keras.Operation.symbolic_call = recorded_operation
    try:
        yield
    finally:
        keras.Layer.__call__, keras.Layer.symbolic_call = call, symbolic_call
        keras.Operation.symbolic_call = operate


def _symbolic_constant(leaf: Any, place: keras.KerasTensor) -> Any:
    """A constant tensor as a symbolic one: zero, cut out of an input, plus the constant."""
    is_tensor = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    if is_symbolic(leaf) or isinstance(leaf, keras.Variable) or not is_tensor:
        return leaf
    dtype = keras.backend.standardize_dtype(leaf.dtype)
    zero = ops.zeros_like(place, dtype=dtype)[(0,) * len(place.shape)]
    return zero + ops.convert_to_numpy(leaf)


# Where Keras keeps account of weights.
_BOOKS = ("_trainable_variables", "_non_trainable_variables")


def _plain(value: Any) -> Any:
    """Lists and dictionaries without Keras' tracking."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) is tuple else [*map(_plain, value)]
    return value
