r"""Normalizations with batch, layer or group statistics, differentiable as often as one likes.

Keras takes variances from `tf.nn.moments`, which holds the mean constant inside the variance. The
term that this drops from the gradient, `-2 mean(x - mu)`, is zero, but its own derivative is not:

    d^2 sigma^2 / dx_i dx_j = 2/n (delta_ij - 1/n),    and without the term    2/n delta_ij.

Here mean and variance are differentiated as they are written,

    c = x - mean(x),    sigma^2 = mean(c^2),    y = c gamma / sqrt(sigma^2 + epsilon) + beta,

in at least float32. Differences are squared, not `mean(x^2) - mean(x)^2` taken, which loses all
digits where the mean is large, and y is formed from c for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.curvature.linear_map import MENDED_SCOPE
from tf_kfacprune.errors import UnsupportedModelError

__all__ = [
    "batch_normalization",
    "group_normalization",
    "layer_normalization",
    "layer_normalization_operation",
    "moments_operation",
    "renormalizes",
]

Call = Callable[..., Any]


def renormalizes(layer: keras.layers.BatchNormalization) -> bool:
    """Whether the layer has `renorm=True`, which Keras 3.12 does not know."""
    return getattr(layer, "renorm", False)


def batch_normalization(layer: keras.layers.BatchNormalization, call: Call) -> Call:
    """`call` of a BatchNormalization, without an update of the moving statistics.

    Args:
        layer: The layer. In inference mode (not training, or not trainable) it is right as it is.
        call: Its `call`.

    Returns:
        A function to put in its place.
    """

    def twice_differentiable_call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if not (training and layer.trainable):
            return call(inputs, training=False, mask=mask)
        if renormalizes(layer):
            raise UnsupportedModelError(
                f"BatchNormalization {layer.name!r} has renorm=True, which corrects batch "
                "statistics by factors that are held constant: its gradient in training mode is "
                "that of no objective, and has no second derivative to be right. Build the layer "
                "with renorm=False, or set `trainable = False` on it."
            )
        x = _widened(inputs)
        axis = layer.axis % len(x.shape)
        others = [k for k in range(len(x.shape)) if k != axis]
        if mask is not None:
            centered, variance = _masked_moments(x, others, mask)
        elif layer.synchronized:
            # Keras takes these from sums over replicas, by formulas that hold nothing constant.
            mean, variance = ops.moments(x, others, keepdims=True, synchronized=True)
            centered = x - mean
        else:
            centered, variance = _moments(x, others)
        y = _scaled(centered, variance, layer.epsilon, layer.gamma, layer.beta, [axis])
        return ops.cast(y, layer.compute_dtype)

    return twice_differentiable_call


def layer_normalization(layer: keras.layers.LayerNormalization, call: Call) -> Call:
    """`call` of a LayerNormalization.

    Args:
        layer: The layer. With `rms_scaling` it is right as it is.
        call: Its `call`.

    Returns:
        A function to put in its place.
    """
    if layer.rms_scaling:
        return call

    def twice_differentiable_call(inputs: Any) -> Any:
        y = _normalized(_widened(inputs), layer.axis, layer.epsilon, layer.gamma, layer.beta)
        # Rounded twice where Keras rounds twice: to the input's type, then to the layer's.
        return ops.cast(ops.cast(y, inputs.dtype), layer.compute_dtype)

    return twice_differentiable_call


def layer_normalization_operation(operation: Any, call: Call) -> Call:
    """`call` of the operation that `keras.ops.layer_normalization` leaves in a functional model.

    Args:
        operation: The operation. With `rms_scaling` it is right as it is.
        call: Its `call`.

    Returns:
        A function to put in its place.
    """
    if operation.rms_scaling:
        return call
    epsilon = keras.config.epsilon() if operation.epsilon is None else operation.epsilon

    def twice_differentiable_call(x: Any, gamma: Any = None, beta: Any = None) -> Any:
        y = _normalized(_widened(x), operation.axis, epsilon, gamma, beta)
        return ops.cast(y, x.dtype)

    return twice_differentiable_call


def group_normalization(layer: keras.layers.GroupNormalization, call: Call) -> Call:
    """`call` of a GroupNormalization.

    Args:
        layer: The layer.
        call: Its `call`, of no use here.

    Returns:
        A function to put in its place.
    """
    del call

    def twice_differentiable_call(inputs: Any) -> Any:
        shape, rank = ops.shape(inputs), len(inputs.shape)
        axis = layer.axis % rank
        members = inputs.shape[axis] // layer.groups
        grouped = (*shape[:axis], layer.groups, members, *shape[axis + 1 :])
        wide = ops.reshape(_widened(inputs), grouped)
        centered, variance = _moments(wide, [k for k in range(1, rank + 1) if k != axis])
        axes = [axis, axis + 1]
        y = _scaled(centered, variance, layer.epsilon, layer.gamma, layer.beta, axes)
        # Rounded twice where Keras rounds twice: to the input's type, then to the layer's.
        return ops.cast(ops.cast(ops.reshape(y, shape), inputs.dtype), layer.compute_dtype)

    return twice_differentiable_call


def moments_operation(operation: Any, call: Call) -> Call:
    """`call` of the operation that `keras.ops.moments` leaves in a functional model.

    Args:
        operation: The operation. Synchronized over replicas it is right as it is.
        call: Its `call`, which gives the mean.

    Returns:
        A function to put in its place.
    """
    if operation.synchronized:
        return call

    def twice_differentiable_call(x: Any) -> Any:
        with tf.name_scope(MENDED_SCOPE):
            mean, _ = call(x)
        _, variance = _moments(_widened(x), operation.axes)
        return mean, ops.saturate_cast(ops.reshape(variance, ops.shape(mean)), mean.dtype)

    return twice_differentiable_call


def _widened(x: Any) -> Any:
    """`x` in at least float32, in which Keras takes statistics too."""
    x = ops.convert_to_tensor(x)
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def _moments(x: Any, axes: int | Sequence[int]) -> tuple[Any, Any]:
    """`x - mean` and the variance, over `axes`, which are kept with size 1."""
    centered = x - ops.mean(x, axes, keepdims=True)
    return centered, ops.mean(ops.square(centered), axes, keepdims=True)


def _masked_moments(x: Any, axes: Sequence[int], mask: Any) -> tuple[Any, Any]:
    """`_moments` over the positions of a Keras mask, one entry for all channels of a position."""
    present = ops.cast(ops.broadcast_to(ops.expand_dims(mask, -1), ops.shape(x)), x.dtype)
    count = ops.sum(present, axes, keepdims=True) + keras.config.epsilon()  # as Keras
    chosen = ops.where(present > 0, x, 0)
    centered = x - ops.sum(chosen, axes, keepdims=True) / count
    squares = ops.square(ops.where(present > 0, centered, 0))
    return centered, ops.sum(squares, axes, keepdims=True) / count


def _normalized(x: Any, axis: int | Sequence[int], epsilon: float, gamma: Any, beta: Any) -> Any:
    """Layer normalization over one axis or several."""
    axes = sorted([axis] if isinstance(axis, int) else axis)
    centered, variance = _moments(x, axes)
    return _scaled(centered, variance, epsilon, gamma, beta, axes)


def _scaled(
    centered: Any, variance: Any, epsilon: float, gamma: Any, beta: Any, axes: Sequence[int]
) -> Any:
    """`c gamma / sqrt(sigma^2 + epsilon) + beta`; gamma and beta lie along `axes`, or are None."""
    shape = [1] * len(centered.shape)
    for axis in axes:
        shape[axis] = centered.shape[axis]
    scale = ops.rsqrt(variance + epsilon)
    if gamma is not None:
        scale = scale * ops.reshape(ops.cast(gamma, centered.dtype), shape)
    y = centered * scale
    if beta is not None:
        y = y + ops.reshape(ops.cast(beta, centered.dtype), shape)
    return y
