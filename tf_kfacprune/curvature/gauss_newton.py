r"""Products of the exact Gauss-Newton matrix of a batch with directions.

=========  ================================================================  ===========
symbol     meaning                                                           shape
=========  ================================================================  ===========
`d`        a direction in the space of the parameters                        (n,)
`u`        what the curvature is taken at: scaled coordinates of the         (m,)
           predictions where the likelihood is known, else predictions
`J`        Jacobian of u by the parameters                                   (m, n)
`H`        Hessian of the loss by u; the identity for scaled coordinates     (m, m)
`F`        `J^T H J`                                                         (n, n)
=========  ================================================================  ===========

`J d` is the derivative of `J^T v` by v: reverse mode twice, which on a CPU is faster than
TensorFlow's forward mode. Nothing of size n x n or m x n is formed.

References:
    Martens & Grosse 2015, section 6.4 and appendix C (products for the re-scaling).
    Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_kfacprune.curvature.batch import Batch
from tf_kfacprune.curvature.objective import CompiledObjective, Entries, SingleObjective

__all__ = ["gauss_newton_form", "gauss_newton_product"]

Objective = CompiledObjective | SingleObjective
_ZERO = tf.UnconnectedGradients.ZERO


def gauss_newton_form(
    network: Any,
    batch: Batch,
    objective: Objective,
    variables: Sequence[Any],
    directions: Sequence[Sequence[Any]],
    *,
    added: Callable[[], Sequence[Any]] = list,
) -> Any:
    """The matrix of products of the Gauss-Newton matrix with directions, in training mode.

    Args:
        network: The model; called as `network(x, training=True)`.
        batch: The batch.
        objective: The loss.
        variables: The parameters.
        directions: r directions, each one tensor per parameter.
        added: Called after the pass: further losses, scalars, that count with their full Hessian.

    Returns:
        `D^T (F + R) D`, shape `(r, r)`, float32, symmetric.
    """
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
        outer.watch(values)
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as inner:
            inner.watch(values)
            entries = objective.entries(batch, network(batch.x, training=True))
            points = [point_of(each) for each in entries]
            further = list(added())
        duals = [tf.zeros_like(point) for point in points]
        outer.watch(duals)
        pulled = inner.gradient(points, values, output_gradients=duals, unconnected_gradients=_ZERO)
        along = [_dot(pulled, direction) for direction in directions]
        slopes = []
        if further:
            gradient = inner.gradient(tf.add_n(further), values, unconnected_gradients=_ZERO)
            slopes = [_dot(gradient, direction) for direction in directions]
    pushed = [outer.gradient(a, duals, unconnected_gradients=_ZERO) for a in along]
    curved = _curved(entries, pushed)
    matrix = _products(pushed, curved)
    if further:
        bent = [outer.gradient(s, values, unconnected_gradients=_ZERO) for s in slopes]
        matrix += _products(directions, bent)
    return 0.5 * (matrix + tf.transpose(matrix))


def gauss_newton_product(
    network: Any, batch: Batch, objective: Objective, values: Sequence[Any], vector: Sequence[Any]
) -> list[Any]:
    """`F d` of a batch, in inference mode.

    Args:
        network: The model; called as `network(x, training=False)`.
        batch: The batch.
        objective: The loss.
        values: The parameters, TensorFlow variables.
        vector: d, one tensor per parameter.
    """
    with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as inner:
            inner.watch(values)
            entries = objective.entries(batch, network(batch.x, training=False))
            points = [point_of(each) for each in entries]
        duals = [tf.zeros_like(point) for point in points]
        outer.watch(duals)
        pulled = inner.gradient(points, values, output_gradients=duals, unconnected_gradients=_ZERO)
        along = _dot(pulled, vector, "float64" if values[0].dtype == tf.float64 else "float32")
    pushed = outer.gradient(along, duals, unconnected_gradients=_ZERO)
    (curved,) = _curved(entries, [pushed])
    return inner.gradient(points, values, output_gradients=curved, unconnected_gradients=_ZERO)


def point_of(entries: Entries) -> Any:
    """U of one output."""
    return entries.scaled_coordinates() if entries.has_coordinates else entries.prediction


def _curved(entries: Sequence[Entries], pushed: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """`H J d` for each direction: one tensor per output."""
    curved = []
    for k, each in enumerate(entries):
        along = [direction[k] for direction in pushed]
        curved.append(along if each.has_coordinates else _hessian_products(each, along))
    return [list(of_direction) for of_direction in zip(*curved, strict=True)]


def _hessian_products(entries: Entries, vectors: Sequence[Any]) -> list[Any]:
    """The Hessian of a loss by its predictions, times each vector."""
    prediction = tf.stop_gradient(entries.prediction)
    coefficients = tf.stop_gradient(entries.coefficients)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(prediction)
        with tf.GradientTape() as inner:
            inner.watch(prediction)
            value = tf.reduce_sum(coefficients * entries.loss.call(entries.labels, prediction))
        gradient = inner.gradient(value, prediction, unconnected_gradients=_ZERO)
        along = [tf.reduce_sum(gradient * vector) for vector in vectors]
    return [outer.gradient(a, prediction, unconnected_gradients=_ZERO) for a in along]


def _products(left: Sequence[Sequence[Any]], right: Sequence[Sequence[Any]]) -> Any:
    return tf.stack([tf.stack([_dot(p, q) for q in right]) for p in left])


def _dot(left: Sequence[Any], right: Sequence[Any], dtype: str = "float32") -> Any:
    pairs = zip(left, right, strict=True)
    return tf.add_n(
        [
            tf.reduce_sum(tf.cast(tf.convert_to_tensor(a), dtype) * tf.cast(b, dtype))
            for a, b in pairs
        ]
    )
