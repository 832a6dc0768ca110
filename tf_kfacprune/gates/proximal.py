"""Deterministic gates, closed by a projected (proximal) gradient step.

The trainable parameter *is* the gate, theta = z in [0, 1]. The cost of a network is linear in
each z_k, so the proximal operator of `lambda c_k z_k + indicator[0, 1]` is a gradient step on
the cost followed by a projection onto [0, 1]: `z <- clip(z - eta (dL/dz + lambda c_k), 0, 1)`.
An Adam-style step divides by the root of E[(dL/dz)^2], the gate's own curvature, which makes the
threshold act on `lambda c_k / sqrt(F_kk)`: optimal brain damage in motion.

References:
    Parikh & Boyd, "Proximal Algorithms", 2014, sections 2.1 and 4.2.
    LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

__all__ = ["Proximal", "UnitInterval"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class UnitInterval(keras.constraints.Constraint):
    """Projects a variable onto [0, 1] after every optimizer step."""

    def __call__(self, w: Any) -> Any:
        return ops.clip(w, 0.0, 1.0)


class Proximal:
    """The gate interface of `HardConcrete` for deterministic gates: the parameter is the value.

    A gate at 0 reopens when the loss pulls it up harder than the cost pulls it down: the gradient
    with respect to z is not zero at z = 0.
    """

    stochastic = False
    initial_parameter = 1.0
    reopened_value = 1.0
    constraint = UnitInterval()

    @classmethod
    def sample(cls, parameters: Any, noise: Any) -> Any:
        """The value itself: nothing is stochastic. `noise` is ignored. Shape `(n,)`."""
        del noise
        return cls.deterministic(parameters)

    @classmethod
    def deterministic(cls, parameters: Any) -> Any:
        """Value of each gate, shape `(n,)` in [0, 1]."""
        return ops.clip(parameters, 0.0, 1.0)

    @classmethod
    def open_probability(cls, parameters: Any) -> Any:
        """The convex surrogate of `z > 0` on [0, 1]: z itself. Shape `(n,)`."""
        return ops.clip(parameters, 0.0, 1.0)

    @classmethod
    def parameter_of_value(cls, value: float) -> float:
        """The parameter whose deterministic value is `value`."""
        return value
