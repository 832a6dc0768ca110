"""Moves weights from a layer to its smaller copy, by role of attribute and axis."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from tf_kfacprune.compaction.plan import RemovalPlan
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph import rule_for
from tf_kfacprune.graph.rules import weight_of

__all__ = ["transfer_weights"]


def transfer_weights(layer: keras.Layer, smaller: keras.Layer, plan: RemovalPlan) -> None:
    """Copies what stays of a layer's weights, with soft gates folded into what reads them.

    Args:
        layer: The original layer.
        smaller: Its built copy.
        plan: Which neurons stay, and the gates that layers read through.

    Raises:
        UnsupportedModelError: If the copy has a weight of another shape that no rule accounts for.
    """
    rule = rule_for(layer)
    roles = plan.channels.roles(layer)

    def count(role: str) -> int | None:
        return len(plan.positions(roles[role])) if role in roles else None

    by_role: set[int] = set()
    for name, axes in rule.weight_roles(layer).items():
        weight, target = weight_of(layer, name), weight_of(smaller, name)
        by_role.add(id(target))
        array = _to_numpy(weight)
        for folded in rule.folded_roles(name):
            scale = plan.scale(layer, folded)
            if scale is not None:
                array = rule.fold(layer, name, folded, array, scale)
        for axis, role in enumerate(axes):
            if role is not None and role in roles:
                array = np.take(array, plan.positions(roles[role]), axis)
        _assign(target, rule.rescale(layer, name, array, count), layer)
    for weight, target in zip(layer.weights, smaller.weights, strict=True):
        if id(target) not in by_role:
            _assign(target, _to_numpy(weight), layer)
    if hasattr(smaller, "finalize_state"):
        smaller.finalize_state()


def _to_numpy(weight: keras.Variable) -> np.ndarray:
    return ops.convert_to_numpy(ops.convert_to_tensor(weight))


def _assign(target: keras.Variable, array: np.ndarray, layer: keras.Layer) -> None:
    if tuple(target.shape) != array.shape:
        raise UnsupportedModelError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be made smaller: the compact "
            f"layer's weight {target.name!r} has shape {tuple(target.shape)}, but {array.shape} "
            "remain of the original. Its channel rule must name the channels of this weight."
        )
    target.assign(array)
