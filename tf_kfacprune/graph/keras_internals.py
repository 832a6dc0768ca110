"""What the package needs of Keras that Keras keeps to itself.

Keras has no public way to walk the graph of a model, so this is the one file of the package that
reads private parts of it (`_nodes_by_depth`, `Node.arguments`, `Sequential._functional`, the call
context). A test cross-checks what is traced with the public `get_config()`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from keras import tree
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.models.functional import Functional
from keras.src.ops.node import Node

__all__ = [
    "CallContext",
    "Functional",
    "call_context",
    "calls_without_trailing_none",
    "clone_input",
    "converted_dtype",
    "forget_calls",
    "fresh_operation",
    "function_between",
    "functional_of",
    "in_mode",
    "inherit_training",
    "input_structure",
    "is_made_by_layer",
    "make_dense",
    "maker_of",
    "mask_of",
    "nodes_of",
    "operation_of",
    "output_structure",
    "reserve_names",
    "set_mask",
    "settings_of",
    "standardized_inputs",
    "take_over_masks",
    "takes_training",
    "tells_shapes",
    "without_trailing_none",
]


def functional_of(operation: Any) -> Functional | None:
    """The graph inside a model, or None if there is none or `call` does more than run it."""
    if isinstance(operation, keras.Sequential):
        plain = type(operation).call is keras.Sequential.call
        return operation._functional if plain else None
    if isinstance(operation, Functional) and type(operation).call is Functional.call:
        return operation
    return None


def function_between(inputs: Sequence[Any], outputs: Sequence[Any]) -> keras.Function:
    """The graph between symbolic tensors, some of which may be inputs and outputs at once."""
    for tensor in inputs:
        if not tensor._keras_history.operation._outbound_nodes:
            keras.ops.stop_gradient(tensor)  # older versions refuse inputs that nothing reads
    return keras.Function(list(inputs), list(outputs))


def nodes_of(function: keras.Function) -> list[Any]:
    """What stands for the recorded calls of a graph, in the order of their execution."""
    nodes_by_depth = function._nodes_by_depth
    depths = sorted(nodes_by_depth, reverse=True)
    return [node for depth in depths for node in nodes_by_depth[depth] if not node.is_input]


def operation_of(tensor: Any) -> Any:
    """The layer or operation whose recorded call has returned a symbolic tensor."""
    return tensor._keras_history.operation


def is_made_by_layer(tensor: Any) -> bool:
    """Whether a symbolic tensor is the output of a layer (or an input), not of an operation."""
    return isinstance(tensor._keras_history.operation, keras.Layer)


def maker_of(tensor: Any) -> Any:
    """The layer or operation that makes a symbolic tensor, if need be inside of a nested model."""
    history = tensor._keras_history
    inside = functional_of(history.operation)
    return history.operation if inside is None else maker_of(inside.outputs[history.tensor_index])


def make_dense(tensor: Any) -> None:
    """Marks a symbolic tensor as dense: Keras takes a product with a plain number for sparse."""
    tensor._sparse = False


def mask_of(tensor: Any) -> Any:
    """The Keras mask of a tensor, or None."""
    return backend.get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Gives a tensor a Keras mask."""
    backend.set_keras_mask(tensor, mask)


def take_over_masks(layer: keras.Layer, inputs: Any, outputs: list[Any], masks: Any) -> None:
    """Gives outputs of a layer the masks that it makes of those of its inputs."""
    layer._set_mask_metadata(inputs, outputs, masks)


def takes_training(operation: Any) -> bool:
    """Whether calls of a layer take `training`."""
    return "training" in getattr(operation, "_call_context_args", ())


def converted_dtype(dtype: str, operation: Any) -> str:
    """The element type to which an operation converts an input before it is called."""
    is_float = "float" in dtype
    converts = isinstance(operation, keras.Layer) and operation.autocast and is_float
    return operation.input_dtype if converts and operation._convert_input_args else dtype


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


@contextmanager
def in_mode(layer: keras.Layer, training: bool) -> Iterator[None]:
    """Runs the body as if inside a call of the layer with this `training`."""
    with call_context(layer, training):
        yield


class CallContext:
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
def call_context(entry: keras.Layer, training: bool | None) -> Iterator[CallContext]:
    """Runs the body as if inside `entry.__call__`."""
    try:
        yield CallContext(entry._get_call_context(), training)
    finally:
        entry._maybe_reset_call_context()


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


def standardized_inputs(functional: Functional, inputs: Any) -> list[Any]:
    """Inputs of a model, flattened, of the element types and ranks that it was built for."""
    return functional._standardize_inputs(inputs)


def input_structure(functional: Functional) -> Any:
    """The structure in which a model takes its inputs."""
    return functional._inputs_struct


def output_structure(functional: Functional) -> Any:
    """The structure in which a model returns its outputs."""
    return functional._outputs_struct


def reserve_names(names: Iterable[str]) -> None:
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


def clone_input(tensor: Any) -> Any:
    """An input of the same type, shape and name."""
    layer = tensor._keras_history.operation
    return type(layer).from_config(layer.get_config()).output
