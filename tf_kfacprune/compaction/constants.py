"""What is left of a residual branch that was removed: one number per channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops, tree

from tf_kfacprune.graph import Call, Value
from tf_kfacprune.graph.rules import weight_of
from tf_kfacprune.graph.rules.base import channel_axis

__all__ = ["Constant", "elementwise", "output_on_zeros", "sum_of"]


class Constant:
    """Stands for a tensor that is the same for every example and at every position.

    Attributes:
        array: Its values with all channels: of the tensor's rank, all other axes of size 1.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def output_on_zeros(call: Call) -> Constant:
    """The output of a contraction that reads zeros everywhere: its bias, activated."""
    layer, rank = call.operation, len(call.outputs[0].shape)
    axis = channel_axis(layer, rank)
    bias = weight_of(layer, "bias")
    size = call.outputs[0].shape[axis] or 0
    values = np.zeros(size, "float32") if bias is None else ops.convert_to_numpy(bias)
    shaped = values.reshape([-1 if k == axis else 1 for k in range(rank)])
    activated = layer.activation(ops.convert_to_tensor(shaped, layer.compute_dtype))
    return Constant(ops.convert_to_numpy(activated))


def elementwise(call: Call, constant: Constant) -> Constant:
    """What an operation that treats each element alone makes of a constant, in inference mode."""

    def fill(leaf: Any) -> Any:
        return constant.array if isinstance(leaf, Value) else leaf

    settings = {key: value for key, value in call.kwargs.items() if not isinstance(value, Value)}
    data = {key: constant.array for key, value in call.kwargs.items() if value in call.inputs}
    result = call.operation(*tree.map_structure(fill, call.args), **settings, **data)
    return Constant(ops.convert_to_numpy(result))


def sum_of(constants: Sequence[Constant], kept: Callable[[int], np.ndarray | None]) -> np.ndarray:
    """The sum of constants without the channels that go, broadcasting like their tensors.

    Args:
        constants: Constants of equal rank.
        kept: The positions that stay on an axis, or None if nothing goes there.

    Returns:
        Array without the batch axis and without leading axes of size 1.
    """
    total = np.sum([constant.array.astype("float32") for constant in constants], axis=0)
    for axis in range(1, total.ndim):
        positions = kept(axis)
        if positions is not None and total.shape[axis] > 1:
            total = np.take(total, positions, axis)
    tracked = [axis for axis in range(1, total.ndim) if total.shape[axis] > 1]
    return total.reshape(total.shape[min([*tracked, total.ndim - 1]) :])
