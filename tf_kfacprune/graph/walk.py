"""The walk through a recorded graph: lists its steps, nested models and opened layers inlined.

What nesting does besides calling its layers (converting inputs, handing `training` down, setting
masks) is kept as `Enter`, `Mask`, `Leave` and `LeaveLayer` steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree

from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.keras_internals import (
    Functional,
    converted_dtype,
    functional_of,
    input_structure,
    mask_of,
    nodes_of,
    operation_of,
    takes_training,
)

__all__ = ["UNSET", "Enter", "Leave", "LeaveLayer", "Mask", "Opened", "Opener", "Step", "Walk"]

UNSET = object()


@dataclass(eq=False)
class Enter:
    """The start of a nested model's call."""

    training: Any  # as given in the call, or UNSET
    masks: tuple[tuple[Value, Value], ...]


@dataclass(eq=False)
class Leave:
    """The end of a nested model's call: its outputs may take over the mask of its input."""

    model: keras.Model
    inputs: tuple[Value, ...]
    mask: Any
    outputs: tuple[Value, ...]


@dataclass(eq=False)
class Mask:
    """The Keras mask of a tensor, as a value of its own."""

    of: Value
    mask: Value


@dataclass(eq=False)
class LeaveLayer:
    """The end of an opened layer's call: its outputs may take over the mask of its input."""

    layer: keras.Layer
    inputs: Any  # the first argument of the call
    mask: Any
    outputs: tuple[Value, ...]
    set_inside: tuple[tuple[Value, Value], ...]  # outputs and masks that the call sets itself


Step = Call | Enter | Mask | Leave | LeaveLayer


@dataclass(frozen=True, eq=False)
class Opened:
    """The inside of a layer's call.

    Attributes:
        function: The layers and operations inside. Its inputs are the tensors of the recorded
            arguments, flattened, followed by the Keras masks that they carry; its outputs are
            those of the call, flattened, followed by the masks that the call itself sets on them.
        masked: Numbers of the outputs on which the call itself sets a mask.
    """

    function: keras.Function
    masked: tuple[int, ...] = ()


# Given a recorded call (an object that stands for it, layer, positional and keyword arguments, the
# Keras mask of each tensor among them), the inside of the call; or why it stays closed; or None if
# it is none of those that would be opened.
Opener = Callable[[Any, Any, Any, Any, Sequence[Any]], Opened | str | None]


class Walk:
    """Lists the steps of a graph, those of the graphs nested in it inlined."""

    def __init__(self, opener: Opener | None) -> None:
        self.opener = opener
        self.steps: list[Step] = []
        self.opened: dict[str, keras.Layer] = {}
        self.closed: dict[str, str] = {}
        self._owners: dict[str, Any] = {}

    def of(self, function: Any, inputs: Sequence[Value], prefix: str) -> list[Value]:
        """Appends the steps of one graph and returns its outputs."""
        env: dict[int, Value] = {
            id(tensor): value for tensor, value in zip(function.inputs, inputs, strict=True)
        }
        for node in nodes_of(function):
            outputs = self._node(node, env, prefix)
            env.update({id(t): v for t, v in zip(node.outputs, outputs, strict=True)})
        return [env[id(tensor)] for tensor in function.outputs]

    def _node(self, node: Any, env: dict[int, Value], prefix: str) -> Sequence[Value]:
        args, kwargs = node.arguments.fill_in(env)
        operation = node.operation
        path = self._path(prefix, operation)
        inner = functional_of(operation)
        if inner is not None:
            return self._inline(operation, inner, args, kwargs, path)
        lowered = getattr(operation, "lowered_layers", None)
        gate_aware = getattr(operation, "gate_aware_of", None)
        if self.opener is not None and lowered is None and gate_aware is None:
            opened = self._open(self.opener, node, path)
            if opened is not None:
                return self._inline_opened(operation, opened, node, args, kwargs, path)
        outputs = _output_values(node, args, kwargs)
        if lowered is not None:
            self._lower(lowered, args, kwargs, outputs, prefix)
        elif gate_aware is not None:
            self.steps.append(Call(gate_aware, args, kwargs, outputs, path, runner=operation))
        else:
            self.steps.append(Call(operation, args, kwargs, outputs, path))
        return outputs

    def _path(self, prefix: str, operation: Any) -> str:
        """The name of an operation below a prefix, of its own in the whole graph.

        In opened layers names may be taken twice. Layers that were renamed after their path, to be
        part of a flat network, keep the path they had.
        """
        path = prefix + operation.name
        if prefix[:-1] in self.opened:
            path = prefix + operation.name.removeprefix(prefix.replace("/", "_"))
        unique, number = path, 0
        while self._owners.setdefault(unique, operation) is not operation:
            number += 1
            unique = f"{path}_{number}"
        return unique

    def _open(self, opener: Opener, node: Any, path: str) -> Opened | None:
        given = node.arguments
        masks = [mask_of(tensor) for tensor in given.keras_tensors]
        found = opener(node, node.operation, given.args, given.kwargs, masks)
        if isinstance(found, str):
            self.closed.setdefault(path, found)
            return None
        if found is not None:
            self.opened.setdefault(path, node.operation)
        return found

    def _inline_opened(
        self, layer: keras.Layer, opened: Opened, node: Any, args: Any, kwargs: Any, path: str
    ) -> list[Value]:
        given = [leaf for leaf in tree.flatten((args, kwargs)) if isinstance(leaf, Value)]
        carried: list[Value] = []
        pairs: list[tuple[int, Value]] = []
        for number, tensor in enumerate(node.arguments.keras_tensors):
            mask = mask_of(tensor)
            if mask is not None:
                carried.append(Value(tuple(mask.shape), mask.dtype))
                pairs.append((number, carried[-1]))
                self.steps.append(Mask(given[number], carried[-1]))
        symbolic = opened.function.inputs[: len(given)]
        values = [self._convert(v, t, path) for v, t in zip(given, symbolic, strict=True)]
        masks = tuple((values[number], mask) for number, mask in pairs)
        self.steps.append(Enter(kwargs.get("training", UNSET), masks))
        found = self.of(opened.function, [*values, *carried], prefix=f"{path}/")
        count = len(found) - len(opened.masked)
        outputs = found[:count]
        set_inside = [(outputs[k], m) for k, m in zip(opened.masked, found[count:], strict=True)]
        first = next(iter(inspect.signature(layer.call).parameters))
        inputs = args[0] if args else kwargs[first]
        leave = LeaveLayer(layer, inputs, kwargs.get("mask"), tuple(outputs), tuple(set_inside))
        self.steps.append(leave)
        return outputs

    def _inline(
        self, model: keras.Model, inner: Functional, args: Any, kwargs: dict[str, Any], path: str
    ) -> list[Value]:
        data = args[0] if args else kwargs["inputs"]
        if isinstance(data, dict) and not isinstance(input_structure(inner), dict):
            data = [data[tensor.name] for tensor in inner.inputs]
        given = tuple(tree.flatten(data))
        values = [
            self._convert(value, tensor, path)
            for value, tensor in zip(given, inner.inputs, strict=True)
        ]
        mask = kwargs.get("mask")
        masks = tree.flatten(mask) if mask is not None else []
        pairs = tuple((v, m) for v, m in zip(values, masks, strict=False) if m is not None)
        self.steps.append(Enter(kwargs.get("training", UNSET), pairs))
        outputs = self.of(inner, values, prefix=f"{path}/")
        self.steps.append(Leave(model, given, mask, tuple(outputs)))
        return outputs

    def _convert(self, value: Value, tensor: Any, path: str) -> Value:
        """What a nested model does to an input of another type or rank than it was built for."""
        target = value.symbolic()
        if value.dtype != tensor.dtype:
            target = keras.ops.cast(target, tensor.dtype)
            value = self._append_operation(target, value, path)
        if len(value.shape) == len(tensor.shape) + 1 and value.shape[-1] == 1:
            value = self._append_operation(keras.ops.squeeze(target, axis=-1), value, path)
        elif len(value.shape) == len(tensor.shape) - 1 and tensor.shape[-1] == 1:
            value = self._append_operation(keras.ops.expand_dims(target, axis=-1), value, path)
        return value

    def _append_operation(self, result: Any, value: Value, path: str) -> Value:
        """Appends the operation that made `result` as a call on `value`."""
        operation = operation_of(result)
        output = Value(tuple(result.shape), result.dtype)
        self.steps.append(Call(operation, (value,), {}, (output,), f"{path}/{operation.name}"))
        return output

    def _lower(
        self,
        layers: Sequence[keras.Layer],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[Value, ...],
        prefix: str,
    ) -> None:
        """Replaces the call of a composed layer by the calls of its parts, in sequence."""
        data = args if args else (kwargs["inputs"],)
        for position, layer in enumerate(layers):
            results = outputs
            if position < len(layers) - 1:
                spec = layer.compute_output_spec(data[0].symbolic())
                results = (Value(tuple(spec.shape), spec.dtype),)
            is_told = "training" in kwargs and takes_training(layer)
            extra = {"training": kwargs["training"]} if is_told else {}
            self.steps.append(Call(layer, data, extra, results, prefix + layer.name))
            data = results


def _output_values(node: Any, args: Any, kwargs: Any) -> tuple[Value, ...]:
    """Output values; their shapes are inferred anew where a nested model got other input shapes.

    Their element types are those of the recorded call. For the inference the inputs have those of
    the recorded call, too, converted as the layer converts them.
    """
    specs: Any = node.outputs
    given = [v for v in tree.flatten((args, kwargs)) if isinstance(v, Value)]
    if [v.shape for v in given] != [tuple(t.shape) for t in node.input_tensors]:
        dtypes = {v: t.dtype for v, t in zip(given, node.input_tensors, strict=True)}

        def symbolic(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            return keras.KerasTensor(leaf.shape, converted_dtype(dtypes[leaf], node.operation))

        args, kwargs = tree.map_structure(symbolic, (args, kwargs))
        kwargs = {k: v for k, v in kwargs.items() if k not in ("mask", "training")}
        specs = tree.flatten(_output_spec(node.operation, args, kwargs))
    shapes = (tuple(spec.shape) for spec in specs)
    return tuple(Value(s, t.dtype) for s, t in zip(shapes, node.outputs, strict=True))


def _output_spec(operation: Any, args: Any, kwargs: Any) -> Any:
    """Shapes of what a call returns, from the call itself if the operation cannot tell."""
    try:
        return operation.compute_output_spec(*args, **kwargs)
    except Exception:  # noqa: BLE001 (whatever a user's own code raises)
        return keras.Operation.compute_output_spec(operation, *args, **kwargs)
