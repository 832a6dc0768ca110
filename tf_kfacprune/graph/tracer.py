"""Traces a Keras model into a flat list of calls, and runs or rebuilds it from that list.

Nested models are inlined and shared layers keep their identity; layers that an `Opener` opens are
inlined like nested models. `Graph.run` equals `model(...)` to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import tree

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.keras_internals import (
    Functional,
    call_context,
    clone_input,
    functional_of,
    input_structure,
    mask_of,
    nodes_of,
    operation_of,
    output_structure,
    reserve_names,
    set_mask,
    standardized_inputs,
    take_over_masks,
    takes_training,
)
from tf_kfacprune.graph.walk import UNSET, Enter, Leave, LeaveLayer, Mask, Opener, Walk

__all__ = ["Graph", "calls_of", "trace"]

CallOperation = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]


class Graph:
    """A model as a list of calls in the order in which Keras executes them.

    Attributes:
        model: The model that was traced.
        inputs: Its inputs, flattened.
        outputs: Its outputs, flattened.
        calls: All calls, nested models and opened layers inlined.
        makers: The call that computes each value.
        opened: The layers that were opened, by path.
        closed: Why layers that might have been opened were not, by path.
    """

    def __init__(
        self,
        model: keras.Model,
        functional: Functional,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        walk: Walk,
    ) -> None:
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.calls = tuple(step for step in walk.steps if isinstance(step, Call))
        self.makers = {value: call for call in self.calls for value in call.outputs}
        self.opened = walk.opened
        self.closed = walk.closed
        self._source = functional
        self._steps = tuple(walk.steps)
        self._opener = walk.opener

    def retrace(self, assume: Callable[[Value], Value]) -> Graph:
        """The graph for inputs of other shapes, as `trace` with `assume`; same opened layers."""
        return trace(self.model, assume, self._opener)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the input layers, in the order of `inputs`."""
        return tuple(operation_of(tensor).name for tensor in self._source.inputs)

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
        flat = standardized_inputs(self._source, inputs)
        with call_context(self._source, training) as context:
            env = self._execute(flat, call_operation or _call, context)
        outputs = self._pack(output_structure(self._source), self.outputs, env)
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
        reserve_names(call.operation.name for call in self.calls)
        symbolic = [(new_input or clone_input)(tensor) for tensor in self._source.inputs]
        if begin is not None:
            begin(symbolic)
        env = self._execute(symbolic, call_operation or _call, None)
        return keras.Model(
            self._pack(input_structure(self._source), self.inputs, env),
            self._pack(output_structure(self._source), self.outputs, env),
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
                if override[-1] is not None and takes_training(step.operation):
                    kwargs["training"] = override[-1]
                results = tree.flatten(call_operation(step, args, kwargs))
                env.update(zip(step.outputs, results, strict=False))
            elif isinstance(step, Enter):
                override.append(_inner_training(step.training, override[-1], context))
                for value, mask in step.masks:
                    set_mask(env[value], env[mask])
            elif isinstance(step, Mask):
                env[step.mask] = mask_of(env[step.of])
            else:
                override.pop()
                if isinstance(step, Leave) and step.model.supports_masking:
                    _leave_masks(step, env)
                elif isinstance(step, LeaveLayer):
                    _set_masks(step, fill(step.inputs), fill(step.mask), env)
        return env


def trace(
    model: keras.Model,
    assume: Callable[[Value], Value] = lambda value: value,
    opener: Opener | None = None,
) -> Graph:
    """Traces a Sequential or Functional model.

    Args:
        model: A built Sequential or Functional model; anything may be nested in it.
        assume: Replaces each input by one of another shape; shapes behind follow.
        opener: Opens layers; by default all stay as they are.

    Returns:
        The traced graph.

    Raises:
        UnsupportedModelError: If the model is not built, or is a subclass with a `call` of its
            own, whose inside cannot be seen.
    """
    functional = functional_of(model)
    if functional is None:
        raise UnsupportedModelError(_why_not_traceable(model))
    inputs = [assume(Value(tuple(t.shape), t.dtype)) for t in functional.inputs]
    walk = Walk(opener)
    outputs = walk.of(functional, inputs, prefix="")
    return Graph(model, functional, inputs, outputs, walk)


def calls_of(function: keras.Function) -> tuple[list[Value], list[Call], list[Value]]:
    """The inputs, calls and outputs of a function, nothing in it inlined."""
    inputs = [Value(tuple(t.shape), t.dtype) for t in function.inputs]
    calls = []
    env = {id(tensor): value for tensor, value in zip(function.inputs, inputs, strict=True)}
    for node in nodes_of(function):
        args, kwargs = node.arguments.fill_in(env)
        outputs = tuple(Value(tuple(t.shape), t.dtype) for t in node.outputs)
        calls.append(Call(node.operation, args, kwargs, outputs, node.operation.name))
        env.update({id(t): v for t, v in zip(node.outputs, outputs, strict=True)})
    return inputs, calls, [env[id(tensor)] for tensor in function.outputs]


def _call(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call.execute(args, kwargs)


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


def _set_masks(step: LeaveLayer, inputs: Any, mask: Any, env: dict[Value, Any]) -> None:
    for value, own in step.set_inside:
        set_mask(env[value], env[own])
    if not step.layer.supports_masking:
        return
    if mask is None:
        mask = tree.map_structure(mask_of, inputs)
    take_over_masks(step.layer, inputs, [env[value] for value in step.outputs], mask)


def _leave_masks(step: Leave, env: dict[Value, Any]) -> None:
    given = [env[value] for value in step.inputs]
    masks = [mask_of(x) for x in given]
    if step.mask is not None:
        masks = [env.get(mask) for mask in tree.flatten(step.mask)]
    take_over_masks(step.model, given, [env[value] for value in step.outputs], masks)


def _inner_training(given: Any, override: bool | None, context: Any) -> bool | None:
    """The `training` that a nested call hands to its inner calls, as Keras resolves it."""
    value: bool | None = override
    if override is None and given is not UNSET:
        value = given
    elif override is None and context is not None:
        value = context.inherited()
    if context is not None:
        context.inherit(value)
    return value
