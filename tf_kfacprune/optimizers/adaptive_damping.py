"""What an optimizer keeps of damping that adapts itself."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.optimizers.factors import AddVariable
from tf_kfacprune.optimizers.hyperparameters import LevenbergMarquardt

__all__ = ["AdaptiveDamping"]

_UNTIL_KNOWN = 1e-2  # damping of steps before the first factors


class AdaptiveDamping:
    """State of `LevenbergMarquardt`.

    Args:
        rule: How the damping follows the steps.
        add_variable: Creates a variable of the optimizer.
    """

    def __init__(self, rule: LevenbergMarquardt, add_variable: AddVariable) -> None:
        self.rule = rule

        def variable(name: str, dtype: str, value: Any = 0) -> keras.Variable:
            initializer = keras.initializers.Constant(value)
            return add_variable((), initializer, dtype=dtype, name=name)

        begin = rule.initial or _UNTIL_KNOWN
        self._value = variable("damping", "float32", begin)
        self._first = variable("first_damping", "float32", begin)
        self._predicted_change = variable("predicted_change", "float32")
        self._watched_until = variable("watched_until", "int64", rule.every)
        self._is_rejected = variable("is_rejected", "bool")
        self._rejected_steps = variable("rejected_steps", "int64")

    @property
    def value(self) -> Any:
        """The damping, scalar tensor."""
        return tf.convert_to_tensor(self._value)

    @property
    def is_rejected(self) -> Any:
        """Whether the last step is to be taken back, boolean scalar tensor."""
        return tf.convert_to_tensor(self._is_rejected)

    @property
    def rejected_steps(self) -> Any:
        """Number of steps that were taken back so far, scalar tensor."""
        return tf.convert_to_tensor(self._rejected_steps)

    def begin(self, typical_eigenvalue: Any) -> None:
        """Sets the damping by the first factors.

        Args:
            typical_eigenvalue: As for `LevenbergMarquardt.beginning`.
        """
        damping = self.rule.beginning(typical_eigenvalue)
        self._value.assign(damping)
        self._first.assign(damping)

    def is_due(self, step: Any) -> Any:
        """Whether the step before this one is to be judged; boolean scalar tensor."""
        return self.rule.is_judged(step, tf.convert_to_tensor(self._watched_until))

    def expect(self, change: Any) -> None:
        """Notes the change of the loss that is predicted for the step to come."""
        self._predicted_change.assign(change)

    def judge(self, change: Any, step: Any) -> None:
        """Compares the change of the loss that a step made with what was expected.

        Args:
            change: Loss after the step minus loss before it, on the same batch. On a batch that
                the step was not computed from, steps that fit noise count as bad.
            step: Number of the step that follows.
        """
        is_watched = step <= tf.convert_to_tensor(self._watched_until)
        damping, is_rejected = self.rule.adapted(
            self.value,
            change,
            tf.convert_to_tensor(self._predicted_change),
            first=tf.convert_to_tensor(self._first),
            steps=tf.where(is_watched, 1, self.rule.every),
        )
        self._value.assign(damping)
        self._is_rejected.assign(is_rejected)

    def keep(self) -> None:
        """The last step stays without being judged."""
        self._is_rejected.assign(False)

    def taken_back(self, step: Any) -> None:
        """Notes that the step before this one was taken back."""
        self._predicted_change.assign(0.0)
        self._rejected_steps.assign(self.rejected_steps + 1)
        self._watched_until.assign(step + self.rule.every)
