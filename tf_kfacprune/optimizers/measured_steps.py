"""The part of `KFAC` that measures steps: the exact quadratic model, and adaptive damping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.distribution import ReplicaLocal, cond
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers.adaptive_damping import AdaptiveDamping
from tf_kfacprune.optimizers.factor_averages import FactorAverages
from tf_kfacprune.optimizers.hyperparameters import (
    Hyperparameter,
    LevenbergMarquardt,
    value_at,
)
from tf_kfacprune.optimizers.steps import dot

__all__ = ["MeasuredSteps", "QuadraticForm"]

QuadraticForm = Callable[[Sequence[Sequence[Any]]], Any]
"""Directions (each a list of tensors like `block_variables`) -> matrix of products D^T F D."""


class MeasuredSteps(FactorAverages):
    """Base of `KFAC`, which documents and checks the settings.

    Args:
        learning_rate: Step size, a float or a schedule.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`.
    """

    is_adaptive: bool
    damping: Hyperparameter | LevenbergMarquardt
    adaptive_damping: AdaptiveDamping | None

    def __init__(self, learning_rate: Any, **kwargs: Any) -> None:
        super().__init__(learning_rate, **kwargs)
        self._quadratic_form = ReplicaLocal()
        self.adaptive_damping = None

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        if isinstance(self.damping, LevenbergMarquardt) and self._layout.states:
            constrained = [v.path for v in self.block_variables if v.constraint is not None]
            if constrained:
                raise InvalidArgumentError(
                    f"Optimizer {self.name!r} judges its steps (learning_rate='auto' or "
                    "damping=LevenbergMarquardt(...)), and cannot take back one that a constraint "
                    f"has moved. Constraints: on {constrained}. Take a fixed learning rate and a "
                    "fixed damping, or leave the constraints out."
                )
            self.adaptive_damping = AdaptiveDamping(self.damping, self.add_variable)

    @property
    def current_damping(self) -> Any:
        """The damping d at this step, a scalar tensor or a number."""
        if self.adaptive_damping is not None:
            return self.adaptive_damping.value
        if isinstance(self.damping, LevenbergMarquardt):
            return self.damping.initial or 0.0  # there is nothing to be damped
        return value_at(self.damping, self.iterations)

    @property
    def needs_quadratic_form(self) -> bool:
        """Whether steps are measured against the exact quadratic model."""
        return bool(self._layout.states) and (self.is_adaptive or self.adaptive_damping is not None)

    @contextmanager
    def measured_by(self, quadratic_form: QuadraticForm | None) -> Iterator[None]:
        """Within this context `apply` takes the quadratic model of its steps from a function.

        Args:
            quadratic_form: As `QuadraticForm`, or None.
        """
        self._quadratic_form.value = quadratic_form
        try:
            yield
        finally:
            self._quadratic_form.value = None

    def _average_in(self, flat: Sequence[Any]) -> None:
        is_first = tf.equal(tf.convert_to_tensor(self._average_weight), 0.0)
        super()._average_in(flat)
        damping = self.adaptive_damping
        if damping is not None and damping.rule.initial is None:
            tf.cond(is_first, lambda: damping.begin(self._typical_eigenvalue()), lambda: None)

    def _typical_eigenvalue(self) -> Any:
        """`tr F^2 / tr F` of the Kronecker-factored curvature, scalar tensor."""
        debias = 1.0 / tf.convert_to_tensor(self._average_weight)
        traces = [state.traces(debias) for state in self._layout.states]
        plain, squared = (tf.add_n(list(each)) for each in zip(*traces, strict=True))
        return tf.math.divide_no_nan(squared, plain)

    @contextmanager
    def last_step_undone(self) -> Iterator[None]:
        """Within this context the variables in blocks are where they were before the last step."""
        variables = self.block_variables
        values = [tf.convert_to_tensor(v) for v in variables]
        for variable, value, index in zip(variables, values, self._layout.in_blocks, strict=True):
            last = tf.convert_to_tensor(self._momentums[index])
            variable.assign(value + tf.cast(last, value.dtype))
        yield
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def take_back_last_step(self) -> None:
        """Puts the variables in blocks back to before the last step, and stands still there."""
        for variable, index in zip(self.block_variables, self._layout.in_blocks, strict=True):
            last = self._momentums[index]
            variable.assign(variable + tf.cast(tf.convert_to_tensor(last), variable.dtype))
            last.assign(tf.zeros(last.shape, last.dtype))
        if self.adaptive_damping is not None:
            self.adaptive_damping.taken_back(tf.convert_to_tensor(self.iterations))
            # With inverses of the old damping the next step would go the same way.
            is_known = tf.convert_to_tensor(self._average_weight) > 0.0
            cond(is_known, self._update_inverses, lambda: None)

    def _quadratic_model(
        self, gradients: Sequence[Any], directions: Sequence[Sequence[Any]]
    ) -> tuple[Any, Any]:
        """K and b of the quadratic model along the given directions."""
        quadratic_form = self._quadratic_form.value
        if quadratic_form is None:
            raise InvalidArgumentError(
                f"Optimizer {self.name!r} needs the quadratic model of the loss "
                "(learning_rate='auto' or damping=LevenbergMarquardt(...)), and the model does not "
                "provide it. Train with kp.KFACModel or kp.PrunableModel."
            )
        k = quadratic_form(directions)
        gram = tf.stack([tf.stack([dot(p, q) for q in directions]) for p in directions])
        b = tf.stack([dot(p, gradients) for p in directions])
        return k + self.current_damping * gram, b
