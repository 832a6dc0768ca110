"""Linear operations whose gradient TensorFlow can compute but not differentiate.

The gradient of a linear map is its adjoint, and the derivative of the adjoint is the map again.
Image resizing has kernels for both, so that derivatives of any order need no formula of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["MENDED_SCOPE", "linear_map"]

Map = Callable[[Any], Any]
# By which an operation in a graph is known whose derivatives are not those of TensorFlow.
MENDED_SCOPE = "mended"


def linear_map(function: Map, x: Any, *, affine: bool = False) -> Any:
    """Applies a linear function, so that the result can be differentiated any number of times.

    Args:
        function: Maps a tensor to a tensor, `A x` or `A x + b`, with a right first derivative. It
            uses no variables.
        x: Its argument, a floating-point tensor.
        affine: Whether there may be a constant b.

    Returns:
        `function(x)`, to the bit.
    """
    shape = tf.shape(x)

    def origin() -> Any:
        # The adjoint does not depend on the point; only its shape matters.
        zeros = tf.zeros(shape, x.dtype)
        zeros.set_shape(x.shape)
        return zeros

    @tf.custom_gradient
    def adjoint(dy: Any) -> tuple[Any, Map]:
        point = origin()
        with tf.GradientTape() as tape:
            tape.watch(point)
            y = function(point)
        dx = tape.gradient(y, point, dy)
        return dx, lambda v: mapped(v) - function(origin()) if affine else mapped(v)

    @tf.custom_gradient
    def mapped(v: Any) -> tuple[Any, Map]:
        with tf.name_scope(MENDED_SCOPE):
            return function(v), adjoint

    return mapped(x)
