r"""Products `D^T F D` of the exact Gauss-Newton matrix of a batch with a few directions.

=========  ================================================================  ===========
symbol     meaning                                                           shape
=========  ================================================================  ===========
`D`        directions in the space of the parameters                         (n, r)
`J`        Jacobian of the natural parameters (logits) of one example        (m, n)
`H`        Hessian of one example's loss with respect to them                (m, m)
`F`        Gauss-Newton matrix, mean over the batch of `J^T H J`             (n, n)
=========  ================================================================  ===========

`J d` is the derivative of `J^T u` by u: reverse mode twice, which on a CPU is faster than
TensorFlow's forward mode. Nothing of size n x n or m x n is formed.

References:
    Martens & Grosse 2015, section 6.4 and appendix C (products for the re-scaling).
    Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature.capture import of_examples
from tf_kfacprune.curvature.objective import Objective

__all__ = ["gauss_newton_form"]

_ZERO = tf.UnconnectedGradients.ZERO


def gauss_newton_form(
    network: Any,
    x: Any,
    y: Any,
    objective: Objective,
    variables: Sequence[keras.Variable],
    directions: Sequence[Sequence[Any]],
    *,
    training: bool,
    weights: Any = None,
) -> Any:
    """The matrix of products of the Gauss-Newton matrix with directions, on one batch.

    Args:
        network: The model; called as `network(x, training=training)`; it has one output.
        x: Inputs.
        y: Labels.
        objective: The loss.
        variables: The parameters.
        directions: r directions, each one tensor per parameter.
        training: Whether layers run in training mode.
        weights: What the loss of each example counts, shape `(batch,)`, or None.

    Returns:
        `D^T F D`, shape `(r, r)`, float32, symmetric.
    """
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(values)
            natural = objective.natural_parameters(network(x, training=training))
        dual = tf.zeros_like(natural)
        outer.watch(dual)
        pulled = inner.gradient(natural, values, output_gradients=dual, unconnected_gradients=_ZERO)
        along = [
            tf.add_n(
                [
                    tf.reduce_sum(tf.convert_to_tensor(p) * tf.cast(d, p.dtype))
                    for p, d in zip(pulled, direction, strict=True)
                ]
            )
            for direction in directions
        ]
    pushed = [outer.gradient(a, dual, unconnected_gradients=_ZERO) for a in along]
    curved = _loss_hessian_products(objective, y, tf.stop_gradient(natural), pushed)
    batch = tf.cast(tf.shape(natural)[0], "float32")
    if weights is not None:
        curved = [of_examples(weights, c) * tf.cast(c, "float32") for c in curved]

    def product(left: Any, right: Any) -> Any:
        return tf.reduce_sum(tf.cast(left, "float32") * tf.cast(right, "float32")) / batch

    matrix = tf.stack([tf.stack([product(p, c) for c in curved]) for p in pushed])
    return 0.5 * (matrix + tf.transpose(matrix))


def _loss_hessian_products(
    objective: Objective, y: Any, natural: Any, vectors: Sequence[Any]
) -> list[Any]:
    """Hessian of the summed loss with respect to the natural parameters, times each vector."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(natural)
        with tf.GradientTape() as inner:
            inner.watch(natural)
            value = objective.sum_at(y, natural)
        gradient = inner.gradient(value, natural, unconnected_gradients=_ZERO)
        along = [tf.reduce_sum(gradient * vector) for vector in vectors]
    return [outer.gradient(a, natural, unconnected_gradients=_ZERO) for a in along]
