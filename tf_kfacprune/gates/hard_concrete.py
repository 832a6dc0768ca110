r"""Stochastic hard-concrete gates.

=========  ==================================================  ========
symbol     meaning                                             shape
=========  ==================================================  ========
`logits`   log alpha, the trainable parameter of each gate     (n,)
`u`        uniform noise in (0, 1), one draw per gate          (n,)
`beta`     temperature of the binary concrete distribution     scalar
`gamma`    lower end of the stretched interval, < 0            scalar
`zeta`     upper end of the stretched interval, > 1            scalar
=========  ==================================================  ========

    s = sigmoid((log u - log(1 - u) + logits) / beta)
    z = min(1, max(0, s (zeta - gamma) + gamma))

The stretched interval puts probability mass on exactly 0 and exactly 1, so that a gate can be
closed for good and still carry a gradient while it is in between.

References:
    Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization",
    ICLR 2018, section 2.2 and equations 10-13.
"""

from __future__ import annotations

import math
from typing import Any

from keras import ops

__all__ = ["HardConcrete"]

_NOISE_MARGIN = 1e-6


class HardConcrete:
    """Values and probabilities of hard-concrete gates, as functions of their parameters."""

    beta = 2.0 / 3.0
    gamma = -0.1
    zeta = 1.1
    stochastic = True
    initial_parameter = 2.0
    reopened_value = 0.5
    constraint = None

    @classmethod
    def sample(cls, parameters: Any, noise: Any) -> Any:
        """One stochastic value per gate.

        Args:
            parameters: Tensor of shape `(n,)`.
            noise: Uniform noise in [0, 1), shape `(n,)`.

        Returns:
            Tensor of shape `(n,)` in [0, 1].
        """
        u = ops.clip(noise, _NOISE_MARGIN, 1.0 - _NOISE_MARGIN)
        s = ops.sigmoid((ops.log(u) - ops.log(1.0 - u) + parameters) / cls.beta)
        return ops.clip(s * (cls.zeta - cls.gamma) + cls.gamma, 0.0, 1.0)

    @classmethod
    def deterministic(cls, parameters: Any) -> Any:
        """Inference-mode value of each gate, shape `(n,)`: exactly 0 closed, exactly 1 open."""
        s = ops.sigmoid(parameters)
        return ops.clip(s * (cls.zeta - cls.gamma) + cls.gamma, 0.0, 1.0)

    @classmethod
    def open_probability(cls, parameters: Any) -> Any:
        """P(z > 0) of each gate, shape `(n,)` (Louizos et al. 2018, eq. 12)."""
        return ops.sigmoid(parameters - cls.beta * math.log(-cls.gamma / cls.zeta))

    @classmethod
    def parameter_of_value(cls, value: float) -> float:
        """The logit whose deterministic value is `value`, for `0 < value < 1`."""
        s = (value - cls.gamma) / (cls.zeta - cls.gamma)
        return math.log(s / (1.0 - s))
