"""Runs the call of a layer on symbolic tensors, so that Keras records what it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops, tree

from tf_kfacprune.graph.keras_internals import (
    calls_without_trailing_none,
    converted_dtype,
    forget_calls,
    function_between,
    in_mode,
    is_made_by_layer,
    make_dense,
    mask_of,
    set_mask,
    without_trailing_none,
)
from tf_kfacprune.graph.rules.registry import has_rule
from tf_kfacprune.graph.rules.substitution import substituted
from tf_kfacprune.graph.symbolic_sizes import symbolic_sizes
from tf_kfacprune.graph.tensorflow_functions import expressed_by_keras
from tf_kfacprune.graph.tracer import calls_of
from tf_kfacprune.graph.walk import Opened
from tf_kfacprune.graph.weight_layer import Weight

__all__ = ["Recording", "missing_masks"]


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
        declared: Shapes of what the call returns, as the layer has told. If given, layers inside
            are trusted about that, too; else their `call` is run to see.
    """

    def __init__(
        self,
        layer: keras.Layer,
        args: Any,
        kwargs: dict[str, Any],
        masks: Sequence[Any],
        declared: Sequence[tuple[int | None, ...]] | None = None,
    ) -> None:
        self.layer = layer
        self._declared = declared
        self._made: list[list[Any]] = []
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
        kwargs = {**kwargs, **missing_masks(self.layer, args, kwargs)}
        if self.takes_training:
            kwargs["training"] = training
        place = self.inputs[0]
        weights = _Weights(self.layer.dtype_policy, place)
        with (
            _symbolic_weights(self.layer, weights),
            symbolic_sizes(),
            expressed_by_keras(),
            _recorded_layers(place, weights, self._declared is not None),
            calls_without_trailing_none() as made,
            in_mode(self.layer, training),
        ):
            self._made.append(made)
            outputs = tree.flatten(self.layer.call(*args, **kwargs))
        outputs = [_symbolic_constant(tensor, place) for tensor in without_trailing_none(outputs)]
        if not outputs or not all(map(is_symbolic, outputs)):
            return None
        if self._declared is not None and len(self._declared) == len(outputs):
            outputs = list(map(_with_known_sizes, outputs, self._declared))
        masked = tuple(
            number
            for number, tensor in enumerate(outputs)
            if mask_of(tensor) is not None and not is_made_by_layer(tensor)
        )
        set_inside = [mask_of(outputs[number]) for number in masked]
        function = function_between([*self.inputs, *self.masks], [*outputs, *set_inside])
        return Opened(function, masked)

    def forget(self) -> None:
        """Undoes what Keras keeps about the calls that were recorded."""
        for made in reversed(self._made):
            forget_calls(made)

    def depends_on_mode(self, opened: Opened) -> bool:
        """Whether what was recorded may be something else in the other mode."""
        _, calls, _ = calls_of(opened.function)
        return self.takes_training or any(c.kwargs.get("training") is not None for c in calls)


def missing_masks(layer: keras.Layer, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for masks that are left out of a call, filled as `Layer.__call__` does.

    Args:
        layer: The layer.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The Keras masks of the tensors among the arguments, by the arguments that take them.
    """
    bound = inspect.signature(layer.call).bind(*args, **kwargs)
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


class _Weights:
    """Symbolic tensors in place of weights, made by `Weight` layers with names of their own."""

    def __init__(self, policy: Any, place: keras.KerasTensor) -> None:
        self._policy, self._place = policy, place
        self._symbolic: dict[int, Any] = {}
        self._names: set[str] = set()

    def __call__(self, leaf: Any) -> Any:
        """What stands for a weight; anything else is handed on."""
        if not isinstance(leaf, keras.Variable):
            return leaf
        if id(leaf) not in self._symbolic:
            name, number = leaf.name, 0
            while name in self._names:
                number += 1
                name = f"{leaf.name}_{number}"
            self._names.add(name)
            self._symbolic[id(leaf)] = Weight.around(leaf, name, self._policy)(self._place)
        return self._symbolic[id(leaf)]


@contextmanager
def _symbolic_weights(layer: Any, weights: _Weights) -> Iterator[None]:
    """Puts symbolic tensors in place of a layer's own weights, so that reading them is recorded."""
    attributes = {}
    for name, value in vars(layer).items():
        if name in _BOOKS or not isinstance(value, (keras.Variable, list, tuple, dict)):
            continue
        if any(isinstance(leaf, keras.Variable) for leaf in tree.flatten(value)):
            attributes[name] = tree.map_structure(weights, _plain(value))
    with substituted(layer, **attributes):
        yield


@contextmanager
def _recorded_layers(
    place: keras.KerasTensor, weights: _Weights, trusts_shapes: bool
) -> Iterator[None]:
    """Records what Keras would not.

    Layers with weights that are called on constants (an embedding of positions) would be run at
    once: the constants are made symbolic. Layers whose own inference of shapes does not know an
    argument of their `call`, or is not to be trusted, infer them from `call`. A weight of another
    layer that an operation reads is put into a `Weight` layer, as the layer's own are.
    """
    call, symbolic_call = keras.Layer.__call__, keras.Layer.symbolic_call
    operate = keras.Operation.symbolic_call
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

    def recorded_operation(operation: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree.map_structure(weights, (args, kwargs))
        return operate(operation, *args, **kwargs)

    keras.Layer.__call__, keras.Layer.symbolic_call = recorded_call, inferred_call
    keras.Operation.symbolic_call = recorded_operation
    try:
        yield
    finally:
        keras.Layer.__call__, keras.Layer.symbolic_call = call, symbolic_call
        keras.Operation.symbolic_call = operate


def _with_known_sizes(tensor: Any, declared: Sequence[int | None]) -> Any:
    """A tensor whose shape says what the layer has told of it and the recording has not found."""
    lost = [k for k, (a, b) in enumerate(zip(tensor.shape, declared, strict=False)) if a != b]
    is_lost = lost and all(tensor.shape[k] is None and declared[k] is not None for k in lost)
    if len(tensor.shape) != len(declared) or not is_lost or declared[0] is not None:
        return tensor
    if any(size is None for size in declared[1:]) or mask_of(tensor) is not None:
        return tensor
    return keras.layers.Reshape(declared[1:], dtype=tensor.dtype)(tensor)


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
