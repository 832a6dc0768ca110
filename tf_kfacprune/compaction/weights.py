"""Moves weights from a layer to its smaller copy, by role of attribute and axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from tf_kfacprune.compaction.plan import RemovalPlan
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph import Weight, rule_for
from tf_kfacprune.graph.rules import weight_of

__all__ = ["WeightLink", "fold_gates", "transfer_weights", "weight_links"]


@dataclass(frozen=True, eq=False)
class WeightLink:
    """A weight of a layer, and the weight of its smaller copy that holds what is left of it.

    Attributes:
        name: Name of the weight in the layer's rule, or an empty one if it has no role there.
        source: The weight of the layer.
        target: The weight of the copy.
        positions: For each axis the positions that stay.
        is_table: Whether `target` holds the same entries in another shape.
    """

    name: str
    source: keras.Variable
    target: keras.Variable
    positions: tuple[np.ndarray, ...]
    is_table: bool = False

    def take(self, array: np.ndarray) -> np.ndarray:
        """What is left of an array of the shape of `source`."""
        for axis, positions in enumerate(self.positions):
            if len(positions) < array.shape[axis]:
                array = np.take(array, positions, axis)
        return array.reshape(self.target.shape) if self.is_table else array

    def fetch(self) -> None:
        """Copies what is left of `source` to `target`."""
        self.target.assign(self.take(_to_numpy(self.source)))

    def write_back(self) -> None:
        """Copies `target` to where it came from; the rest of `source` is left alone."""
        array = np.array(_to_numpy(self.source))
        left = [len(positions) for positions in self.positions]
        array[np.ix_(*self.positions)] = _to_numpy(self.target).reshape(left)
        self.source.assign(array)

    @property
    def is_copy(self) -> bool:
        """Whether `target` is nothing but what is left of `source`, to the bit."""
        return np.array_equal(self.take(_to_numpy(self.source)), _to_numpy(self.target))


def weight_links(
    layer: keras.Layer, smaller: keras.Layer, plan: RemovalPlan
) -> Iterator[WeightLink]:
    """Which weight of the copy belongs to which of the layer.

    Args:
        layer: The original layer.
        smaller: Its built copy.
        plan: Which neurons stay.
    """
    roles = plan.channels.roles(layer)
    by_role: set[int] = set()
    for name, axes in rule_for(layer).weight_roles(layer).items():
        is_table = isinstance(layer, Weight)
        weight = weight_of(layer, name)
        target = smaller.weights[0] if is_table else weight_of(smaller, name)
        by_role.add(id(target))
        positions = tuple(
            plan.positions(roles[role]) if role is not None and role in roles else np.arange(size)
            for role, size in zip(axes, weight.shape, strict=True)
        )
        yield WeightLink(name, weight, target, positions, is_table)
    for weight, target in zip(layer.weights, smaller.weights, strict=True):
        if id(target) not in by_role:
            yield WeightLink("", weight, target, tuple(map(np.arange, weight.shape)))


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

    for link in weight_links(layer, smaller, plan):
        array = link.take(_folded(layer, link.name, link.source, plan))
        _assign(link.target, rule.rescale(layer, link.name, array, count), layer)
    if hasattr(smaller, "finalize_state"):
        smaller.finalize_state()


def fold_gates(layer: keras.Layer, plan: RemovalPlan) -> None:
    """Folds half-open gates that a layer reads through into its own weights, in place.

    Args:
        layer: The layer.
        plan: The gates that layers read through.

    Raises:
        UnsupportedModelError: If that would change a weight that is frozen.
    """
    for name in rule_for(layer).weight_roles(layer):
        weight = weight_of(layer, name)
        before = _to_numpy(weight)
        folded = _folded(layer, name, weight, plan, is_soft_only=True)
        if np.array_equal(before, folded):
            continue
        if not weight.trainable:
            raise UnsupportedModelError(
                f"Weight {weight.path!r} of layer {layer.name!r} is frozen, and half-open gates "
                "would have to be folded into it."
            )
        weight.assign(folded)


def _folded(
    layer: keras.Layer,
    name: str,
    weight: keras.Variable,
    plan: RemovalPlan,
    *,
    is_soft_only: bool = False,
) -> np.ndarray:
    rule, array = rule_for(layer), _to_numpy(weight)
    for role in rule.folded_roles(name):
        scale = plan.scale(layer, role)
        if scale is not None:
            if is_soft_only:  # what closed gates hide is not read, and stays as it is
                scale = np.where(scale == 0, 1.0, scale).astype(scale.dtype)
            array = rule.fold(layer, name, role, array, scale)
    return array


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
