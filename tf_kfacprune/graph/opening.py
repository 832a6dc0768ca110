"""Opens custom layers: what `call` does becomes part of the graph.

A layer without a channel rule is called on symbolic tensors, `call` in place of `__call__`, and
what it does is recorded: the layers that it calls, with their names and weights, operations of
`keras.ops`, and weights of its own (`Weight` layers around them). The analysis, the gates and the
compaction then see the inside. Nested custom layers are opened in turn.

What was recorded is run next to the layer itself, in inference and in training mode, on random
inputs and with weights changed at random, so that a value that was computed from a weight while
recording, and would stay as it was, shows. The weights are put back afterwards. Whatever cannot be
recorded or differs stays one opaque layer, with the reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops, tree

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.calls import Value
from tf_kfacprune.graph.keras_internals import (
    inherit_training,
    mask_of,
    nodes_of,
    settings_of,
    tells_shapes,
)
from tf_kfacprune.graph.opened_equality import describe_error, is_noise, why_different
from tf_kfacprune.graph.recording import Recording
from tf_kfacprune.graph.rules.registry import has_rule, rule_for, take_rule_of
from tf_kfacprune.graph.tracer import Graph, calls_of, trace
from tf_kfacprune.graph.walk import Opened
from tf_kfacprune.graph.weight_layer import Weight

__all__ = ["OpaqueLayer", "keep_opaque", "opaque_layers", "open_layer", "trace_opened"]

LayerOrClass = TypeVar("LayerOrClass")

_MARK = "_kfacprune_opaque"
_CACHE = "_kfacprune_openings"

KEPT = "kept opaque by the caller"
REGULARIZED = "it has an activity_regularizer"
BRANCHES = "its call does something else in training than in inference"
NOT_RECORDED = "its call cannot run on symbolic tensors: {}"
NOT_TENSORS = "its call returns something that is not computed from its inputs by Keras operations"


def keep_opaque(layer: LayerOrClass) -> LayerOrClass:
    """Keeps a custom layer closed: what is inside its call is neither analysed nor pruned.

    Args:
        layer: A layer, or a layer class (whose subclasses then stay closed, too). Works as a class
            decorator.

    Returns:
        What was given.

    Raises:
        InvalidArgumentError: If something else than a layer or a layer class is given.

    Examples:
        >>> kp.keep_opaque(network.get_layer("block3"))
    """
    is_class = inspect.isclass(layer) and issubclass(layer, keras.Layer)
    if is_class:
        setattr(layer, _MARK, True)
    elif isinstance(layer, keras.Layer):
        vars(layer)[_MARK] = True
    else:
        raise InvalidArgumentError(
            "keep_opaque takes a Keras layer or a class of layers. "
            f"Received: {layer!r} (of type {type(layer).__name__})"
        )
    return layer


def trace_opened(model: keras.Model) -> Graph:
    """Traces a Sequential or Functional model with its custom layers opened.

    Args:
        model: As for `trace`.

    Returns:
        The traced graph; `opened` and `closed` say what was opened and what was not.

    Raises:
        UnsupportedModelError: If the model cannot be traced.
    """
    return trace(model, opener=open_layer)


@dataclass(frozen=True)
class OpaqueLayer:
    """A layer of which is not known what it does to channels.

    Attributes:
        path: Its path.
        layer: The layer.
        reason: Why it was not opened.
    """

    path: str
    layer: keras.Layer
    reason: str

    @property
    def params(self) -> int:
        """Number of its weights."""
        return sum(math.prod(weight.shape) for weight in self.layer.weights)


def opaque_layers(graph: Graph) -> list[OpaqueLayer]:
    """The layers of a graph whose inside is not seen, in order.

    They have no channel rule and were not opened, or their rule does not know what they hold.

    Args:
        graph: A graph made by `trace_opened`.

    Returns:
        Each layer once, with the reason.
    """
    found: dict[int, OpaqueLayer] = {}
    for call in graph.calls:
        if not call.is_layer:
            continue
        if has_rule(call.operation):
            reason = rule_for(call.operation).why_opaque(call.operation)
        else:
            reason = graph.closed.get(call.path, reasons.UNKNOWN_OPERATION)
        if reason is not None:
            found.setdefault(id(call.operation), OpaqueLayer(call.path, call.operation, reason))
    return list(found.values())


def open_layer(
    call: Any, layer: Any, args: Any, kwargs: dict[str, Any], masks: Sequence[Any]
) -> Opened | str | None:
    """Opens a layer; see `Opener`.

    Args:
        call: The recorded call, with its outputs: what was found about it once holds ever after.
        layer: The layer or operation that was called.
        args: Positional arguments, symbolic tensors and settings.
        kwargs: Keyword arguments, likewise.
        masks: For each symbolic tensor of the arguments its Keras mask, or None.

    Returns:
        The inside of the call, or the reason why it stays closed, or None for operations and for
        layers with a channel rule or that add noise in training and nothing in inference.
    """
    if not isinstance(layer, keras.Layer) or has_rule(layer) or not layer.built:
        return None
    if getattr(layer, _MARK, False):
        return KEPT
    # Past Keras' tracking, which would take the recorded graph for a part of the layer.
    known: _Openings = vars(layer).setdefault(_CACHE, _Openings())
    if call not in known.by_call:
        declared = [tuple(tensor.shape) for tensor in call.outputs]
        found = _open(layer, args, kwargs, masks, declared)
        if found is None:
            return None
        known.by_call[call] = found
    return known.by_call[call]


class _Openings:
    """What was found about the calls of a layer; a class of its own, which nothing saves."""

    def __init__(self) -> None:
        self.by_call: dict[Any, Opened | str] = {}

    def __deepcopy__(self, memo: Any) -> _Openings:
        return _Openings()


def _open(
    layer: keras.Layer,
    args: Any,
    kwargs: dict[str, Any],
    masks: Sequence[Any],
    declared: Sequence[tuple[int | None, ...]],
) -> Opened | str | None:
    if layer.activity_regularizer is not None:
        return REGULARIZED
    first = Recording(layer, args, kwargs, masks, declared)
    found = _recorded(first)
    if not isinstance(found, str):
        return found
    # A layer inside may be mistaken about the shape of what it returns.
    first.forget()
    second = Recording(layer, args, kwargs, masks)
    found_without_trust = _recorded(second)
    if isinstance(found_without_trust, str) or (
        found_without_trust is not None and not _can_be_rebuilt(found_without_trust)
    ):
        second.forget()
        return found
    return found_without_trust


def _can_be_rebuilt(opened: Opened) -> bool:
    """Whether layers inside that stay closed tell the shapes of what they return."""
    for call in nodes_of(opened.function):
        inside = call.arguments
        masks = [mask_of(tensor) for tensor in inside.keras_tensors]
        found = open_layer(call, call.operation, inside.args, inside.kwargs, masks)
        if isinstance(found, str) and not tells_shapes(call):
            return False
    return True


def _recorded(recording: Recording) -> Opened | str | None:
    try:
        opened = recording.record(training=False)
        if opened is not None and is_noise(recording, opened):
            take_rule_of(recording.layer, keras.layers.Dropout)
            return None
        if opened is not None and recording.depends_on_mode(opened):
            in_training = recording.record(training=True)
            if in_training is None:
                return BRANCHES
            handed_down = _differences(opened, in_training)
            if handed_down is not None:
                inherit_training(opened.function, handed_down)
            else:
                # Perhaps noise is called in training alone: in inference it does nothing.
                return _both_modes(recording, in_training)
    except Exception as error:  # noqa: BLE001 (whatever a user's own code raises)
        return NOT_RECORDED.format(describe_error(error))
    if opened is None:
        return NOT_TENSORS
    return why_different(recording, opened) or opened


def _both_modes(recording: Recording, in_training: Opened) -> Opened | str:
    """What was recorded in training, if it is the same function in inference, too."""
    _, calls, _ = calls_of(in_training.function)
    modes = [number for number, c in enumerate(calls) if c.kwargs.get("training") is True]
    inherit_training(in_training.function, modes)
    return BRANCHES if why_different(recording, in_training) else in_training


def _differences(first: Opened, second: Opened) -> list[int] | None:
    """Numbers of the calls that differ in `training` alone; None if anything else differs."""
    if first.masked != second.masked:
        return None
    inputs, calls, outputs = calls_of(first.function)
    others, other_calls, other_outputs = calls_of(second.function)
    if len(calls) != len(other_calls) or len(outputs) != len(other_outputs):
        return None
    twin = dict(zip(others, inputs, strict=True))
    found = []
    for number, (call, other) in enumerate(zip(calls, other_calls, strict=True)):
        if not _same_operation(call.operation, other.operation):
            return None
        kwargs, other_kwargs = dict(call.kwargs), dict(other.kwargs)
        modes = kwargs.pop("training", None), other_kwargs.pop("training", None)
        if modes == (False, True):
            found.append(number)
        elif modes[0] != modes[1]:
            return None
        if not _same((call.args, kwargs), (other.args, other_kwargs), twin):
            return None
        twin.update(zip(other.outputs, call.outputs, strict=True))
    return found if _same(outputs, other_outputs, twin) else None


def _same_operation(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if type(first) is Weight and type(second) is Weight:
        return first.weight is second.weight
    if type(first) is not type(second):
        return False
    if isinstance(first, keras.Layer):  # made while recording, to express a size
        is_stateless = not first.variables and not second.variables
        return is_stateless and _config(first) == _config(second)
    own, others = settings_of(first), settings_of(second)
    return own.keys() == others.keys() and _same(_sorted(own), _sorted(others), {})


def _config(layer: keras.Layer) -> dict[str, Any]:
    return {key: value for key, value in layer.get_config().items() if key != "name"}


def _sorted(settings: dict[str, Any]) -> list[Any]:
    return [settings[key] for key in sorted(settings)]


def _same(first: Any, second: Any, twin: dict[Value, Value]) -> bool:
    """Whether two recorded structures are equal, given which values correspond."""
    try:
        tree.assert_same_structure(first, second)
    except (TypeError, ValueError):
        return False
    pairs = zip(tree.flatten(first), tree.flatten(second), strict=True)
    return all(_same_leaf(a, b, twin) for a, b in pairs)


def _same_leaf(a: Any, b: Any, twin: dict[Value, Value]) -> bool:
    if isinstance(b, Value):
        return a is twin.get(b, b)
    if a is b:
        return True
    if hasattr(a, "shape") and hasattr(b, "shape"):
        return np.array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    return type(a) is type(b) and bool(a == b)
