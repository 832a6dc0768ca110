"""Traces a Keras model into a flat list of calls, and runs or rebuilds it from that list.

Keras has no public way to walk the graph of a model, so this is the one file of the package that
reads private parts of it (`_nodes_by_depth`, `Node.arguments`, `Sequential._functional`, the call
context). A test cross-checks the result with the public `get_config()`.

Nested models are inlined and shared layers keep their identity. What nesting does besides calling
its layers (converting inputs, handing `training` down, setting masks) is kept as `_Enter` and
`_Leave` steps, so that `Graph.run` equals `model(...)` to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree
from keras.src import backend
from keras.src.models.functional import Functional

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph.calls import Call, Value

__all__ = ["Graph", "fresh_operation", "trace"]

CallOperation = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
_UNSET = object()


@dataclass(eq=False)
class _Enter:
    """The start of a nested model's call."""

    training: Any  # as given in the call, or _UNSET
    masks: tuple[tuple[Value, Value], ...]


@dataclass(eq=False)
class _Leave:
    """The end of a nested model's call: its outputs may take over the mask of its input."""

    model: keras.Model
    inputs: tuple[Value, ...]
    mask: Any
    outputs: tuple[Value, ...]


class Graph:
    """A model as a list of calls in the order in which Keras executes them.

    Attributes:
        model: The model that was traced.
        inputs: Its inputs, flattened.
        outputs: Its outputs, flattened.
        calls: All calls, nested models inlined.
    """

    def __init__(
        self,
        model: keras.Model,
        functional: Functional,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        steps: Sequence[Call | _Enter | _Leave],
    ) -> None:
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.calls = tuple(step for step in steps if isinstance(step, Call))
        self._functional = functional
        self._steps = tuple(steps)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the input layers, in the order of `inputs`."""
        return tuple(tensor._keras_history.operation.name for tensor in self._functional.inputs)

    def run(
        self,
        inputs: Any,
        call_operation: CallOperation | None = None,
        training: bool | None = None,
    ) -> Any:
        """Executes the graph on tensors, eagerly or inside a `tf.function`.

        Args:
            inputs: Inputs in the structure of the model's inputs.
            call_operation: `call_operation(call, args, kwargs)` executes one call and returns its
                outputs. Defaults to `call.execute(args, kwargs)`.
            training: As in `model(inputs, training=...)`. As in Keras, a value given here
                overrides the `training` of every inner call, even one given explicitly.

        Returns:
            The outputs in the structure of the model's outputs, equal to the bit to
            `model(inputs, training=training)`, masks included.
        """
        flat = self._functional._standardize_inputs(inputs)
        with _call_context(self._functional, training) as context:
            env = self._execute(flat, call_operation or _call, context)
        outputs = self._pack(self._functional._outputs_struct, self.outputs, env)
        single = isinstance(outputs, (list, tuple)) and len(outputs) == 1
        return outputs[0] if single else outputs

    def rebuild(
        self,
        call_operation: CallOperation | None = None,
        begin: Callable[[Sequence[Any]], None] | None = None,
        new_input: Callable[[Any], Any] | None = None,
    ) -> keras.Model:
        """Replays the graph on symbolic tensors into a new, flat Functional model.

        Args:
            call_operation: As in `run`, on symbolic tensors.
            begin: Receives the new model's inputs before the first call.
            new_input: Makes an input of the new model from one of the traced one; by default one of
                the same type, shape and name.

        Returns:
            A model with the name and the input and output structure of the traced one.
        """
        symbolic = [(new_input or _clone_input)(tensor) for tensor in self._functional.inputs]
        if begin is not None:
            begin(symbolic)
        env = self._execute(symbolic, call_operation or _call, None)
        return keras.Model(
            self._pack(self._functional._inputs_struct, self.inputs, env),
            self._pack(self._functional._outputs_struct, self.outputs, env),
            name=self.model.name,
        )

    def _pack(self, structure: Any, values: Sequence[Value], env: dict[Value, Any]) -> Any:
        return tree.pack_sequence_as(structure, [env[value] for value in values])

    def _execute(
        self, inputs: Sequence[Any], call_operation: CallOperation, context: Any
    ) -> dict[Value, Any]:
        env: dict[Value, Any] = dict(zip(self.inputs, inputs, strict=True))

        def fill(structure: Any) -> Any:
            return tree.map_structure(
                lambda leaf: env[leaf] if isinstance(leaf, Value) else leaf, structure
            )

        override = [None if context is None else context.training]
        for step in self._steps:
            if isinstance(step, Call):
                args, kwargs = fill(step.args), fill(step.kwargs)
                if override[-1] is not None and _takes_training(step.operation):
                    kwargs["training"] = override[-1]
                results = tree.flatten(call_operation(step, args, kwargs))
                env.update(zip(step.outputs, results, strict=False))
            elif isinstance(step, _Enter):
                override.append(_inner_training(step.training, override[-1], context))
                for value, mask in step.masks:
                    backend.set_keras_mask(env[value], env[mask])
            else:
                override.pop()
                if step.model.supports_masking:
                    _leave_masks(step, env)
        return env


def trace(model: keras.Model, assume: Callable[[Value], Value] = lambda value: value) -> Graph:
    """Traces a Sequential or Functional model.

    Args:
        model: A built Sequential or Functional model; anything may be nested in it.
        assume: Replaces each input by one of another shape; shapes behind follow.

    Returns:
        The traced graph.

    Raises:
        UnsupportedModelError: If the model is not built, or is a subclass with a `call` of its
            own, whose inside cannot be seen.
    """
    functional = _functional_of(model)
    if functional is None:
        raise UnsupportedModelError(_why_not_traceable(model))
    inputs = [assume(Value(tuple(t.shape), t.dtype)) for t in functional.inputs]
    steps: list[Call | _Enter | _Leave] = []
    outputs = _walk(functional, inputs, steps, prefix="")
    return Graph(model, functional, inputs, outputs, steps)


def fresh_operation(operation: Any, name: str) -> Any:
    """A copy of a stateless operation under another name, free of its history in other graphs."""
    twin = copy.copy(operation)
    twin.name = name
    twin._inbound_nodes = []
    twin._outbound_nodes = []
    return twin


def _call(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call.execute(args, kwargs)


def _functional_of(operation: Any) -> Functional | None:
    """The graph inside a model, or None if there is none or `call` does more than run it."""
    if isinstance(operation, keras.Sequential):
        plain = type(operation).call is keras.Sequential.call
        return operation._functional if plain else None
    if isinstance(operation, Functional) and type(operation).call is Functional.call:
        return operation
    return None


def _why_not_traceable(model: Any) -> str:
    if not isinstance(model, keras.Model):
        return f"Expected a keras.Model. Received: {model!r} (of type {type(model).__name__})"
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return (
            f"Sequential model {model.name!r} has no input shape yet, so its layers have no sizes. "
            "Start it with keras.Input(shape=...) or call model.build(input_shape)."
        )
    return (
        f"Model {model.name!r} is a subclass ({type(model).__name__}) with its own `call`, whose "
        "inside cannot be seen. Build it with the Functional API: "
        "keras.Model(inputs, outputs)."
    )


def _walk(
    functional: Functional,
    inputs: Sequence[Value],
    steps: list[Call | _Enter | _Leave],
    prefix: str,
) -> list[Value]:
    """Appends the calls of one graph to `steps` and returns its outputs."""
    env: dict[int, Value] = {
        id(tensor): value for tensor, value in zip(functional.inputs, inputs, strict=True)
    }
    nodes_by_depth = functional._nodes_by_depth
    for depth in sorted(nodes_by_depth, reverse=True):
        for node in nodes_by_depth[depth]:
            if not node.is_input:
                outputs = _walk_node(node, env, steps, prefix)
                env.update({id(t): v for t, v in zip(node.outputs, outputs, strict=True)})
    return [env[id(tensor)] for tensor in functional.outputs]


def _walk_node(
    node: Any, env: dict[int, Value], steps: list[Call | _Enter | _Leave], prefix: str
) -> Sequence[Value]:
    args, kwargs = node.arguments.fill_in(env)
    operation = node.operation
    path = prefix + operation.name
    inner = _functional_of(operation)
    if inner is not None:
        return _inline(operation, inner, args, kwargs, steps, path)
    outputs = _output_values(node, args, kwargs)
    lowered = getattr(operation, "lowered_layers", None)
    gate_aware = getattr(operation, "gate_aware_of", None)
    if lowered is not None:
        _lower(lowered, args, kwargs, outputs, steps, prefix)
    elif gate_aware is not None:
        steps.append(Call(gate_aware, args, kwargs, outputs, path, runner=operation))
    else:
        steps.append(Call(operation, args, kwargs, outputs, path))
    return outputs


def _output_values(node: Any, args: Any, kwargs: Any) -> tuple[Value, ...]:
    """Output values; their shapes are inferred anew where a nested model got other input shapes."""
    given = [v for v in tree.flatten((args, kwargs)) if isinstance(v, Value)]
    specs: Any = node.outputs
    if [v.shape for v in given] != [tuple(t.shape) for t in node.input_tensors]:
        args, kwargs = tree.map_structure(
            lambda leaf: leaf.symbolic() if isinstance(leaf, Value) else leaf, (args, kwargs)
        )
        kwargs = {k: v for k, v in kwargs.items() if k not in ("mask", "training")}
        specs = tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
    return tuple(Value(tuple(t.shape), t.dtype) for t in specs)


def _inline(
    model: keras.Model,
    inner: Functional,
    args: Any,
    kwargs: dict[str, Any],
    steps: list[Call | _Enter | _Leave],
    path: str,
) -> list[Value]:
    data = args[0] if args else kwargs["inputs"]
    if isinstance(data, dict) and not isinstance(inner._inputs_struct, dict):
        data = [data[tensor.name] for tensor in inner.inputs]
    given = tuple(tree.flatten(data))
    values = [
        _convert(value, tensor, steps, path)
        for value, tensor in zip(given, inner.inputs, strict=True)
    ]
    mask = kwargs.get("mask")
    masks = tree.flatten(mask) if mask is not None else []
    pairs = tuple((v, m) for v, m in zip(values, masks, strict=False) if m is not None)
    steps.append(_Enter(kwargs.get("training", _UNSET), pairs))
    outputs = _walk(inner, values, steps, prefix=f"{path}/")
    steps.append(_Leave(model, given, mask, tuple(outputs)))
    return outputs


def _convert(value: Value, tensor: Any, steps: list[Call | _Enter | _Leave], path: str) -> Value:
    """What a nested model does to an input of another type or rank than it was built for."""
    target = value.symbolic()
    if value.dtype != tensor.dtype:
        target = keras.ops.cast(target, tensor.dtype)
        value = _append_operation(target, value, steps, path)
    if len(value.shape) == len(tensor.shape) + 1 and value.shape[-1] == 1:
        value = _append_operation(keras.ops.squeeze(target, axis=-1), value, steps, path)
    elif len(value.shape) == len(tensor.shape) - 1 and tensor.shape[-1] == 1:
        value = _append_operation(keras.ops.expand_dims(target, axis=-1), value, steps, path)
    return value


def _append_operation(result: Any, value: Value, steps: list[Any], path: str) -> Value:
    """Appends the operation that made `result` as a call on `value`."""
    operation = result._keras_history.operation
    output = Value(tuple(result.shape), result.dtype)
    steps.append(Call(operation, (value,), {}, (output,), f"{path}/{operation.name}"))
    return output


def _lower(
    layers: Sequence[keras.Layer],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: tuple[Value, ...],
    steps: list[Call | _Enter | _Leave],
    prefix: str,
) -> None:
    """Replaces the call of a composed layer by the calls of its parts, in sequence."""
    data = args if args else (kwargs["inputs"],)
    for position, layer in enumerate(layers):
        results = outputs
        if position < len(layers) - 1:
            spec = layer.compute_output_spec(data[0].symbolic())
            results = (Value(tuple(spec.shape), spec.dtype),)
        takes_training = "training" in kwargs and _takes_training(layer)
        extra = {"training": kwargs["training"]} if takes_training else {}
        steps.append(Call(layer, data, extra, results, prefix + layer.name))
        data = results


def _takes_training(operation: Any) -> bool:
    return "training" in getattr(operation, "_call_context_args", ())


def _leave_masks(step: _Leave, env: dict[Value, Any]) -> None:
    given = [env[value] for value in step.inputs]
    masks = [backend.get_keras_mask(x) for x in given]
    if step.mask is not None:
        masks = [env.get(mask) for mask in tree.flatten(step.mask)]
    step.model._set_mask_metadata(given, [env[value] for value in step.outputs], masks)


def _inner_training(given: Any, override: bool | None, context: Any) -> bool | None:
    """The `training` that a nested call hands to its inner calls, as Keras resolves it."""
    value: bool | None = override
    if override is None and given is not _UNSET:
        value = given
    elif override is None and context is not None:
        value = context.inherited()
    if context is not None:
        context.inherit(value)
    return value


class _CallContext:
    """Keras' record of the `training` argument in force, shared by all calls within one call."""

    def __init__(self, keras_context: Any, training: bool | None) -> None:
        self._keras_context = keras_context
        self.training = self.inherited() if training is None else training
        self.inherit(self.training)

    def inherited(self) -> bool | None:
        return self._keras_context.get_value("training")

    def inherit(self, training: bool | None) -> None:
        self._keras_context.set_value("training", training)


@contextmanager
def _call_context(entry: Functional, training: bool | None) -> Iterator[_CallContext]:
    """Runs the body as if inside `entry.__call__`."""
    try:
        yield _CallContext(entry._get_call_context(), training)
    finally:
        entry._maybe_reset_call_context()


def _clone_input(tensor: Any) -> Any:
    layer = tensor._keras_history.operation
    return type(layer).from_config(layer.get_config()).output
