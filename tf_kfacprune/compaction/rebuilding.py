"""Rebuilds a gated network without its closed neurons and without its gates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from tf_kfacprune.compaction.constants import Constant, elementwise, output_on_zeros, sum_of
from tf_kfacprune.compaction.own_weights import holder, look_up
from tf_kfacprune.compaction.plan import RemovalPlan
from tf_kfacprune.compaction.weights import WeightLink, transfer_weights, weight_links
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.gates import GateBank
from tf_kfacprune.gates.rules import GateRule
from tf_kfacprune.graph import Call, Value, Weight, fresh_operation, rule_for
from tf_kfacprune.graph.keras_internals import mask_of, set_mask
from tf_kfacprune.graph.recording import missing_masks
from tf_kfacprune.graph.rules.activations import activation_reason
from tf_kfacprune.graph.rules.registry import has_rule

__all__ = ["rebuild_compact"]


def rebuild_compact(plan: RemovalPlan) -> tuple[keras.Model, list[WeightLink]]:
    """Replays the network with smaller copies of its layers.

    Args:
        plan: Which neurons stay.

    Returns:
        A flat Functional model without gates that shares no weights with the network, and where
        each of its weights comes from.
    """
    replay = _Replay(plan)
    model = plan.graph.rebuild(replay, begin=replay.begin)
    links = [link for pair in replay.copied_layers() for link in weight_links(*pair, plan)]
    return model, links


class _Replay:
    """Executes calls on symbolic tensors with compact layers in place of the originals."""

    def __init__(self, plan: RemovalPlan) -> None:
        self._plan = plan
        self._compact: dict[Any, Any] = {}
        self._names = set(plan.graph.input_names)
        self._selected: dict[tuple[Value, int], Any] = {}
        self._held: dict[Weight, Any] = {}
        self._place: Any = None

    def begin(self, inputs: Sequence[Any]) -> None:
        """Takes note of the new model's inputs."""
        self._place = inputs[0]

    def copied_layers(self) -> list[tuple[keras.Layer, keras.Layer]]:
        """The layers of the network and their smaller copies."""
        pairs = self._compact.items()
        return [(old, new) for old, new in pairs if old is not new and isinstance(old, keras.Layer)]

    def __call__(self, call: Call, args: Any, kwargs: Any) -> Any:
        operation, rule = call.operation, rule_for(call.operation)
        if isinstance(operation, GateBank):
            return [None] * len(call.outputs)
        kwargs = call.without_gates(kwargs)
        if self._plan.is_cut(call):
            return output_on_zeros(call)
        constants = [x for x in tree.flatten((args, kwargs)) if isinstance(x, Constant)]
        if constants and self._plan.is_constant(call.outputs[0]):
            return elementwise(call, constants[0])
        if not self._plan.is_needed(call):
            return [None] * len(call.outputs)
        if isinstance(operation, Weight):
            return self._hold(call, operation)
        if constants:
            return self._add_constants(call, args, kwargs, constants)
        args, kwargs = self._select_features(call, args, kwargs)
        args, kwargs = call.map_data(partial(self._scaled, call), args, kwargs)
        if isinstance(rule, GateRule):
            return tree.flatten(args)[0]
        if not call.is_layer:
            outputs = rule.replay(call, args, kwargs, self._plan)
            if outputs is not NotImplemented:
                return outputs
        if operation in self._compact:
            return self._compact[operation](*args, **kwargs)
        compact = self._compact[operation] = self._copy(call)
        outputs = compact(*args, **kwargs)
        if call.is_layer and compact is not operation:
            if not has_rule(operation) and _anatomy(operation) != _anatomy(compact):
                self._compact[operation] = operation  # as it is: its config makes other weights
                return operation(*args, **kwargs)
            transfer_weights(operation, compact, self._plan)
        return outputs

    def _hold(self, call: Call, weight: Weight) -> Any:
        """What is left of an opened layer's own weight, held by an ordinary layer."""
        if weight not in self._held:
            shape = [size or 0 for size in self._plan.shape(call.outputs[0])]
            table = self._compact[weight] = holder(weight, shape, self._free_name(call))
            self._held[weight] = look_up(table, shape, self._place)
            transfer_weights(weight, table, self._plan)
        return self._held[weight]

    def _add_constants(self, call: Call, args: Any, kwargs: Any, constants: list[Constant]) -> Any:
        """A sum of which some operands are constants, with as few layers as possible."""
        args, kwargs = self._select_features(call, args, kwargs)
        tensors = [x for x in tree.flatten((args, kwargs)) if not isinstance(x, Constant)]
        result = tensors[0]
        if len(tensors) > 1:
            if call.operation not in self._compact:
                self._compact[call.operation] = keras.layers.Add(name=self._free_name(call))
            result = self._compact[call.operation](tensors)
        total = sum_of(constants, lambda axis: self._plan.kept(call.outputs[0], axis))
        if not total.any() and result.dtype == call.outputs[0].dtype:
            return result
        policy = call.operation.dtype_policy if call.is_layer else None
        return keras.layers.Rescaling(
            1.0, total.tolist(), name=self._free_name(call, "_constant"), dtype=policy
        )(result)

    def _scaled(self, call: Call, value: Any, tensor: Any) -> Any:
        """A tensor times the gates on it that its reader does not absorb."""
        if isinstance(value, Value):
            for axis, scale in self._plan.unfolded(call, value):
                shape = [-1 if k == axis else 1 for k in range(len(value.shape))]
                tensor = ops.multiply(tensor, scale.reshape(shape).astype(value.dtype))
        return tensor

    def _select_features(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Picks the input features and flattened features that are still read."""

        def select(value: Any, tensor: Any) -> Any:
            selection = None
            if isinstance(value, Value):
                selection = self._plan.channels.flow.selections.get((call, value))
            if selection is None:
                return tensor
            axis, labels = selection
            kept = self._plan.positions(self._plan.channels.neurons(labels))
            there = self._plan.kept(value, axis)
            there = np.arange(len(labels)) if there is None else there
            if len(kept) == len(there):
                return tensor
            if (value, axis) not in self._selected:
                taken = ops.take(tensor, np.searchsorted(there, kept).tolist(), axis=axis)
                set_mask(taken, mask_of(tensor))
                self._selected[value, axis] = taken
            return self._selected[value, axis]

        args, kwargs = call.map_data(select, args, kwargs)
        chosen = {id(tensor) for tensor in self._selected.values()}
        if call.is_layer and any(id(x) in chosen for x in tree.flatten((args, kwargs))):
            # At run time an operation loses the mask, so that it must be handed over.
            masks = missing_masks(call.operation, args, kwargs)
            kwargs |= {name: mask for name, mask in masks.items() if _is_set(mask)}
        return args, kwargs

    def _copy(self, call: Call) -> Any:
        operation = call.operation
        name = self._free_name(call)
        if not call.is_layer:
            return fresh_operation(operation, name)
        if hasattr(operation, "adapt") and not operation.weights:
            return operation  # a lookup table, whose contents are in no config
        config = self._edited_config(call)
        is_edited = config != _config(operation)
        if activation_reason(getattr(operation, "activation", None)) is None:
            # A function of the user's own need not be registered with Keras to be kept.
            config.update({key: operation.activation for key in ("activation",) if key in config})
        try:
            return type(operation).from_config({**config, "name": name})
        except Exception as error:
            if not is_edited and not self._is_touched(operation):
                return operation  # as it is; some layers do not survive their own config
            raise UnsupportedModelError(
                f"Layer {call.path!r} ({type(operation).__name__}) cannot be built anew from its "
                f"config, so it cannot be made smaller: {error}. Exclude the layers whose neurons "
                "it reads, or fix its get_config."
            ) from error

    def _edited_config(self, call: Call) -> dict[str, Any]:
        layer = call.operation
        roles = self._plan.channels.roles(layer)

        def count(role: str) -> int | None:
            return len(self._plan.positions(roles[role])) if role in roles else None

        config = _config(layer)
        shape = self._plan.shape(call.outputs[0])
        rule_for(layer).edit_config(layer, config, count, shape)
        return config

    def _is_touched(self, layer: keras.Layer) -> bool:
        """Whether a layer loses channels or absorbs a gate."""
        if self._plan.is_scaled(layer):
            return True
        axes = self._plan.channels.roles(layer).values()
        return any(len(self._plan.positions(neurons)) < len(neurons) for neurons in axes)

    def _free_name(self, call: Call, suffix: str = "") -> str:
        path = call.path.replace("/", "_") + suffix
        name, number = call.operation.name + suffix, 0
        while name in self._names:
            name = f"{path}_{number}" if number else path
            number += 1
        self._names.add(name)
        return name


def _is_set(mask: Any) -> bool:
    return any(leaf is not None for leaf in tree.flatten(mask))


def _config(layer: keras.Layer) -> dict[str, Any]:
    try:
        return layer.get_config()
    except Exception:  # noqa: BLE001 (whatever a user's own code raises)
        return {}


def _anatomy(layer: keras.Layer) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's weights, in order."""
    return [(weight.name, tuple(weight.shape)) for weight in layer.weights]
