"""The part of `KFAC` that measures steps: the exact quadratic model, and adaptive damping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.distribution import ReplicaLocal
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers.factor_averages import FactorAverages
from tf_kfacprune.optimizers.hyperparameters import (
    Hyperparameter,
    LevenbergMarquardt,
    value_at,
)
from tf_kfacprune.optimizers.steps import dot

__all__ = ["MeasuredSteps", "QuadraticForm"]

_UNTIL_KNOWN = 1e-2  # damping of steps before the first factors

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

    def __init__(self, learning_rate: Any, **kwargs: Any) -> None:
        super().__init__(learning_rate, **kwargs)
        self._quadratic_form = ReplicaLocal()

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self._damping_value: keras.Variable | None = None
        if isinstance(self.damping, LevenbergMarquardt):
            initializer = keras.initializers.Constant(self.damping.initial or _UNTIL_KNOWN)
            self._damping_value = self.add_variable(
                (), initializer, dtype="float32", name="damping"
            )
            self._first_damping = self.add_variable(
                (), initializer, dtype="float32", name="first_damping"
            )
            self._predicted_change = self.add_variable((), dtype="float32", name="predicted_change")
            initializer = keras.initializers.Constant(self.damping.every)
            self._watched_until = self.add_variable(
                (), initializer, dtype="int64", name="watched_until"
            )
            self._is_rejected = self.add_variable((), dtype="bool", name="is_rejected")
            self._rejected_steps = self.add_variable((), dtype="int64", name="rejected_steps")

    @property
    def current_damping(self) -> Any:
        """The damping d at this step, a scalar tensor or a number."""
        if self._damping_value is not None:
            return tf.convert_to_tensor(self._damping_value)
        return value_at(self.damping, self.iterations)

    @property
    def needs_quadratic_form(self) -> bool:
        """Whether steps are measured against the exact quadratic model."""
        return bool(self._layout.states) and (
            self.is_adaptive or isinstance(self.damping, LevenbergMarquardt)
        )

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
        if isinstance(self.damping, LevenbergMarquardt) and self.damping.initial is None:
            tf.cond(is_first, self._start_damping, lambda: None)

    def _start_damping(self) -> None:
        """Damping in proportion to the curvature, which has the scale of loss and inputs."""
        if not isinstance(self.damping, LevenbergMarquardt) or self._damping_value is None:
            return
        debias = 1.0 / tf.convert_to_tensor(self._average_weight)
        traces = [state.traces(debias) for state in self._layout.states]
        plain, squared = (tf.add_n(list(each)) for each in zip(*traces, strict=True))
        damping = self.damping.beginning(tf.math.divide_no_nan(squared, plain))
        self._damping_value.assign(damping)
        self._first_damping.assign(damping)

    @property
    def judges_steps(self) -> bool:
        """Whether the damping follows what steps do to the loss."""
        return isinstance(self.damping, LevenbergMarquardt) and bool(self._layout.states)

    def judgement_due(self, step: Any = None) -> Any:
        """Boolean scalar tensor: whether a step is to be judged when the next one begins.

        Args:
            step: Number of that next one; by default the step that is about to begin.
        """
        if not isinstance(self.damping, LevenbergMarquardt):
            return tf.constant(False)
        step = tf.convert_to_tensor(self.iterations if step is None else step)
        return self.damping.is_judged(step, tf.convert_to_tensor(self._watched_until))

    @property
    def rejected_steps(self) -> Any:
        """Number of steps that were taken back so far, a scalar tensor."""
        return tf.convert_to_tensor(self._rejected_steps)

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

    def begin_judging(self) -> None:
        """Until `judge` says otherwise, the last step is to stay."""
        self._is_rejected.assign(False)

    @property
    def is_rejected(self) -> Any:
        """Whether the last step is to be taken back, boolean scalar tensor."""
        return tf.convert_to_tensor(self._is_rejected)

    def take_back_last_step(self) -> None:
        """Puts the variables in blocks back to before the last step, and stands still there."""
        for variable, index in zip(self.block_variables, self._layout.in_blocks, strict=True):
            last = self._momentums[index]
            variable.assign(variable + tf.cast(tf.convert_to_tensor(last), variable.dtype))
            last.assign(tf.zeros(last.shape, last.dtype))
        self._predicted_change.assign(0.0)
        self._rejected_steps.assign(self._rejected_steps + 1)
        if isinstance(self.damping, LevenbergMarquardt):
            step = tf.convert_to_tensor(self.iterations)
            self._watched_until.assign(step + self.damping.every)

    def judge(self, loss_change: Any) -> None:
        """Moves the damping by how well the change that the last step made was predicted.

        Args:
            loss_change: Loss after the last step minus loss before it, on the same batch. On a
                batch that the step was not computed from, steps that fit noise count as bad.
        """
        if isinstance(self.damping, LevenbergMarquardt) and self._damping_value is not None:
            predicted = tf.convert_to_tensor(self._predicted_change)
            old = tf.convert_to_tensor(self._damping_value)
            first = tf.convert_to_tensor(self._first_damping)
            is_watched = tf.convert_to_tensor(self.iterations) <= self._watched_until
            damping, is_rejected = self.damping.adapted(
                old,
                loss_change,
                predicted,
                first=first,
                steps=tf.where(is_watched, 1, self.damping.every),
            )
            self._damping_value.assign(damping)
            self._is_rejected.assign(is_rejected)

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
