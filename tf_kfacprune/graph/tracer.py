"""Traces a Keras model into a flat list of calls, and runs or rebuilds it from that list.

Keras has no public way to walk the graph of a model, so this is the one file of the package that
reads private parts of it (`_nodes_by_depth`, `Node.arguments`, `Sequential._functional`, the call
context). A test cross-checks the result with the public `get_config()`.

Nested models are inlined and shared layers keep their identity. What nesting does besides calling
its layers (converting inputs, handing `training` down, setting masks) is kept as `_Enter`, `_Mask`,
`_Leave` and `_LeaveLayer` steps, so that `Graph.run` equals `model(...)` to the bit. Layers that an
`Opener` opens are inlined like nested models.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.models.functional import Functional
from keras.src.ops.node import Node

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph.calls import Call, Value

__all__ = [
    "Graph",
    "Opened",
    "Opener",
    "calls_of",
    "calls_without_trailing_none",
    "converted_dtype",
    "forget_calls",
    "fresh_operation",
    "in_mode",
    "inherit_training",
    "is_made_by_layer",
    "make_dense",
    "maker_of",
    "mask_of",
    "nodes_of",
    "set_mask",
    "settings_of",
    "tells_shapes",
    "trace",
    "without_trailing_none",
]

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


@dataclass(eq=False)
class _Mask:
    """The Keras mask of a tensor, as a value of its own."""

    of: Value
    mask: Value


@dataclass(eq=False)
class _LeaveLayer:
    """The end of an opened layer's call: its outputs may take over the mask of its input."""

    layer: keras.Layer
    inputs: Any  # the first argument of the call
    mask: Any
    outputs: tuple[Value, ...]
    set_inside: tuple[tuple[Value, Value], ...]  # outputs and masks that the call sets itself


_Step = Call | _Enter | _Mask | _Leave | _LeaveLayer


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


class Graph:
    """A model as a list of calls in the order in which Keras executes them.

    Attributes:
        model: The model that was traced.
        inputs: Its inputs, flattened.
        outputs: Its outputs, flattened.
        calls: All calls, nested models and opened layers inlined.
        opened: The layers that were opened, by path.
        closed: Why layers that might have been opened were not, by path.
    """

    def __init__(
        self,
        model: keras.Model,
        functional: Functional,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        walk: _Walk,
    ) -> None:
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.calls = tuple(step for step in walk.steps if isinstance(step, Call))
        self.opened = walk.opened
        self.closed = walk.closed
        self._functional = functional
        self._steps = tuple(walk.steps)
        self._opener = walk.opener

    def retrace(self, assume: Callable[[Value], Value]) -> Graph:
        """The graph for inputs of other shapes, as `trace` with `assume`; same opened layers."""
        return trace(self.model, assume, self._opener)

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
        _reserve_names(call.operation.name for call in self.calls)
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
            elif isinstance(step, _Mask):
                env[step.mask] = backend.get_keras_mask(env[step.of])
            else:
                override.pop()
                if isinstance(step, _Leave) and step.model.supports_masking:
                    _leave_masks(step, env)
                elif isinstance(step, _LeaveLayer):
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
    functional = _functional_of(model)
    if functional is None:
        raise UnsupportedModelError(_why_not_traceable(model))
    inputs = [assume(Value(tuple(t.shape), t.dtype)) for t in functional.inputs]
    walk = _Walk(opener)
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


def mask_of(tensor: Any) -> Any:
    """The Keras mask of a tensor, or None."""
    return backend.get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Gives a tensor a Keras mask."""
    backend.set_keras_mask(tensor, mask)


def is_made_by_layer(tensor: Any) -> bool:
    """Whether a symbolic tensor is the output of a layer (or an input), not of an operation."""
    return isinstance(tensor._keras_history.operation, keras.Layer)


def maker_of(tensor: Any) -> Any:
    """The layer or operation that makes a symbolic tensor, if need be inside of a nested model."""
    history = tensor._keras_history
    inside = _functional_of(history.operation)
    return history.operation if inside is None else maker_of(inside.outputs[history.tensor_index])


def make_dense(tensor: Any) -> None:
    """Marks a symbolic tensor as dense: Keras takes a product with a plain number for sparse."""
    tensor._sparse = False


@contextmanager
def in_mode(layer: keras.Layer, training: bool) -> Iterator[None]:
    """Runs the body as if inside a call of the layer with this `training`."""
    with _call_context(layer, training):
        yield


def without_trailing_none(outputs: Sequence[Any]) -> list[Any]:
    """What a call returns, without the None behind its tensors; the first entry stays."""
    kept = list(outputs)
    while len(kept) > 1 and kept[-1] is None:
        kept.pop()
    return kept


@contextmanager
def calls_without_trailing_none() -> Iterator[list[Any]]:
    """Lets Keras record calls of layers that return None behind their tensors, as for no cache.

    Replayed, such a layer returns as many tensors as were recorded, and what follows is left out.

    Yields:
        What stands for the calls that are being recorded, for `forget_calls`.
    """
    original, made = Node.__init__, []

    def initialize(
        self: Any,
        operation: Any,
        call_args: Any = None,
        call_kwargs: Any = None,
        outputs: Any = None,
    ) -> None:
        flat = tree.flatten(outputs)
        kept = without_trailing_none(flat)
        cut = len(kept) < len(flat)
        original(self, operation, call_args, call_kwargs, kept if cut else outputs)
        made.append(self)

    Node.__init__ = initialize
    try:
        yield made
    finally:
        Node.__init__ = original


def forget_calls(made: Sequence[Any]) -> None:
    """Makes Keras forget calls, which it would take for what their layers return in later ones.

    Args:
        made: What `calls_without_trailing_none` has yielded.
    """
    for node in reversed(made):
        if node.operation is not None and node in node.operation._inbound_nodes:
            node.operation._inbound_nodes.remove(node)
        for tensor in node.arguments.keras_tensors:
            history = tensor._keras_history.operation
            if node in history._outbound_nodes:
                history._outbound_nodes.remove(node)


def inherit_training(function: keras.Function, positions: Iterable[int]) -> None:
    """Makes calls of a function take `training` from the call around them.

    Args:
        function: The function.
        positions: The calls, by their position in `calls_of(function)`.
    """
    nodes = nodes_of(function)
    for position in positions:
        del nodes[position].arguments.kwargs["training"]


def nodes_of(function: keras.Function) -> list[Any]:
    """What stands for the recorded calls of a graph, in the order of their execution."""
    nodes_by_depth = function._nodes_by_depth
    depths = sorted(nodes_by_depth, reverse=True)
    return [node for depth in depths for node in nodes_by_depth[depth] if not node.is_input]


def tells_shapes(call: Any) -> bool:
    """Whether an operation knows beforehand the shapes of what a recorded call returned."""
    try:
        given = call.arguments
        specs = tree.flatten(call.operation.compute_output_spec(*given.args, **given.kwargs))
    except Exception:  # noqa: BLE001 (whatever a user's own code raises)
        return False
    return [len(s.shape) for s in specs] == [len(t.shape) for t in call.outputs]


def fresh_operation(operation: Any, name: str) -> Any:
    """A copy of a stateless operation under another name, free of its history in other graphs."""
    twin = copy.copy(operation)
    twin.name = name
    twin._inbound_nodes = []
    twin._outbound_nodes = []
    return twin


def settings_of(operation: Any) -> dict[str, Any]:
    """What tells a stateless operation from others of its class."""
    of_graph = {"name", "_inbound_nodes", "_outbound_nodes", "_auto_config"}
    return {key: value for key, value in vars(operation).items() if key not in of_graph}


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


class _Walk:
    """Lists the steps of a graph, those of the graphs nested in it inlined."""

    def __init__(self, opener: Opener | None) -> None:
        self.opener = opener
        self.steps: list[_Step] = []
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
        inner = _functional_of(operation)
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
        masks = [backend.get_keras_mask(tensor) for tensor in given.keras_tensors]
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
            mask = backend.get_keras_mask(tensor)
            if mask is not None:
                carried.append(Value(tuple(mask.shape), mask.dtype))
                pairs.append((number, carried[-1]))
                self.steps.append(_Mask(given[number], carried[-1]))
        symbolic = opened.function.inputs[: len(given)]
        values = [self._convert(v, t, path) for v, t in zip(given, symbolic, strict=True)]
        masks = tuple((values[number], mask) for number, mask in pairs)
        self.steps.append(_Enter(kwargs.get("training", _UNSET), masks))
        found = self.of(opened.function, [*values, *carried], prefix=f"{path}/")
        count = len(found) - len(opened.masked)
        outputs = found[:count]
        set_inside = [(outputs[k], m) for k, m in zip(opened.masked, found[count:], strict=True)]
        first = next(iter(inspect.signature(layer.call).parameters))
        inputs = args[0] if args else kwargs[first]
        leave = _LeaveLayer(layer, inputs, kwargs.get("mask"), tuple(outputs), tuple(set_inside))
        self.steps.append(leave)
        return outputs

    def _inline(
        self, model: keras.Model, inner: Functional, args: Any, kwargs: dict[str, Any], path: str
    ) -> list[Value]:
        data = args[0] if args else kwargs["inputs"]
        if isinstance(data, dict) and not isinstance(inner._inputs_struct, dict):
            data = [data[tensor.name] for tensor in inner.inputs]
        given = tuple(tree.flatten(data))
        values = [
            self._convert(value, tensor, path)
            for value, tensor in zip(given, inner.inputs, strict=True)
        ]
        mask = kwargs.get("mask")
        masks = tree.flatten(mask) if mask is not None else []
        pairs = tuple((v, m) for v, m in zip(values, masks, strict=False) if m is not None)
        self.steps.append(_Enter(kwargs.get("training", _UNSET), pairs))
        outputs = self.of(inner, values, prefix=f"{path}/")
        self.steps.append(_Leave(model, given, mask, tuple(outputs)))
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
        operation = result._keras_history.operation
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
            takes_training = "training" in kwargs and _takes_training(layer)
            extra = {"training": kwargs["training"]} if takes_training else {}
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


def converted_dtype(dtype: str, operation: Any) -> str:
    """The element type to which an operation converts an input before it is called."""
    is_float = "float" in dtype
    converts = isinstance(operation, keras.Layer) and operation.autocast and is_float
    return operation.input_dtype if converts and operation._convert_input_args else dtype


def _takes_training(operation: Any) -> bool:
    return "training" in getattr(operation, "_call_context_args", ())


def _set_masks(step: _LeaveLayer, inputs: Any, mask: Any, env: dict[Value, Any]) -> None:
    for value, own in step.set_inside:
        backend.set_keras_mask(env[value], env[own])
    if not step.layer.supports_masking:
        return
    if mask is None:
        mask = tree.map_structure(backend.get_keras_mask, inputs)
    step.layer._set_mask_metadata(inputs, [env[value] for value in step.outputs], mask)


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
def _call_context(entry: keras.Layer, training: bool | None) -> Iterator[_CallContext]:
    """Runs the body as if inside `entry.__call__`."""
    try:
        yield _CallContext(entry._get_call_context(), training)
    finally:
        entry._maybe_reset_call_context()


def _reserve_names(names: Iterable[str]) -> None:
    """Keeps Keras from giving names that are taken to operations that are made from now on.

    In the process that made a model it counts them itself, but not in one that loaded the model.
    """
    counts = global_state.get_global_attribute(
        "object_name_uids", default=defaultdict(int), set_to_default=True
    )
    for name in names:
        prefix, _, number = name.rpartition("_")
        if not number.isdigit():
            prefix, number = name, "0"
        counts[prefix] = max(counts[prefix], int(number) + 1)


def _clone_input(tensor: Any) -> Any:
    layer = tensor._keras_history.operation
    return type(layer).from_config(layer.get_config()).output
