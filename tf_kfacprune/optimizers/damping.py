"""Hyper-parameters that are numbers or schedules; damping that adapts itself, and its state."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.optimizers.factors import AddVariable
from tf_kfacprune.validation import is_number_in, require, require_count, require_number

__all__ = [
    "AdaptiveDamping",
    "Hyperparameter",
    "LevenbergMarquardt",
    "check_hyperparameter",
    "value_at",
]

Hyperparameter: TypeAlias = "float | keras.optimizers.schedules.LearningRateSchedule"
Schedule = keras.optimizers.schedules.LearningRateSchedule

_GOOD = 0.25  # share of the predicted decrease on new examples above which damping falls

_RELATIVE = 0.3  # first damping in units of the typical eigenvalue of the curvature
_REJECTED = 3.0  # factor on the damping when a step is taken back
_LARGEST = 10.0  # largest damping in units of the first
_UNTIL_KNOWN = 1e-2  # damping of steps before the first factors
_JUMP = 10.0  # growth of the loss, in units of the loss itself, that no batch explains
_DECAY_OF_LOSS = 0.9


def check_hyperparameter(
    owner: str, name: str, value: Any, interval: str, *, optional: bool = False
) -> None:
    """Checks a number; a schedule is checked to be one.

    Raises:
        InvalidArgumentError: Naming the argument, its value and what was expected.
    """
    if isinstance(value, Schedule) or (optional and value is None):
        return
    expected = f"a number in {interval}{', None' * optional} or a schedule"
    require(owner, is_number_in(value, interval), name, expected, value)


def value_at(value: Hyperparameter, step: Any) -> Any:
    """The value of a hyper-parameter at a step: a number, or a scalar tensor."""
    return ops.cast(value(step), "float32") if isinstance(value, Schedule) else value


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class LevenbergMarquardt:
    """Damping that follows what steps do to examples they were not computed from.

    Every `every` steps the change of the loss that a step made on the *next* batch is compared
    with the change that its damped quadratic model predicted on its own. Where the loss fell by
    more than a quarter of the prediction the damping is multiplied by `decay` for each step since
    the last comparison, where it rose it is divided by that. A step is taken back, and the damping
    is multiplied by 3, if the loss rose by more than it was to fall, or is no number any more.
    Each of the first `every` steps is compared, and each of as many after one that was taken back.

    Levenberg and Marquardt judge a step on the batch it was computed from. There, a step that fits
    the noise of the batch looks perfect, and the damping vanishes until training diverges; on new
    examples even a good step keeps only part of what it promised, hence the lower thresholds.

    Args:
        initial: Damping to begin with, > 0, in units of the curvature of the compiled loss. None
            means 0.3 times the typical eigenvalue of the first factors, `tr F^2 / tr F`, whatever
            the scale of loss and inputs.
        decay: Factor per step, in (0, 1).
        every: Steps between comparisons, an integer >= 1; each costs one forward pass. A step
            that made the loss infinite is compared at once.
        minimum: Smallest damping, > 0.
        maximum: Largest damping. None means 10 times the first: where noise decides whether a step
            helps, the damping would rise until training stood still.

    Raises:
        InvalidArgumentError: If an argument is out of range.

    Examples:
        >>> optimizer = kp.KFAC("auto", damping=kp.LevenbergMarquardt(initial=0.1))

    References:
        Martens & Grosse 2015, section 6.5 (every 5 steps; decay 19/20, on one batch).
    """

    def __init__(
        self,
        initial: float | None = None,
        decay: float = 0.9,
        every: int = 5,
        minimum: float = 1e-8,
        maximum: float | None = None,
    ) -> None:
        check = functools.partial(require, "LevenbergMarquardt")
        check_number = functools.partial(require_number, "LevenbergMarquardt")
        check_number("initial", initial, "(0, inf)", optional=True)
        check_number("decay", decay, "(0, 1)")
        check_number("minimum", minimum, "(0, inf)")
        check_number("maximum", maximum, "(0, inf]", optional=True)
        require_count("LevenbergMarquardt", "every", every)
        bounds = [bound for bound in (initial, maximum) if bound is not None]
        is_least = minimum <= min(bounds, default=minimum)
        check(is_least, "minimum", "<= initial and <= maximum", minimum)
        is_largest = maximum is None or maximum >= (initial or minimum)
        check(is_largest, "maximum", ">= initial, or None", maximum)
        self.initial = initial
        self.decay = decay
        self.every = every
        self.minimum = minimum
        self.maximum = maximum

    def beginning(self, typical_eigenvalue: Any) -> Any:
        """The damping to begin with where `initial` is None, scalar tensor.

        Args:
            typical_eigenvalue: `tr F^2 / tr F` of the Kronecker-factored curvature: the mean of
                its eigenvalues, each weighted by itself; scalar tensor.
        """
        damping = ops.maximum(_RELATIVE * typical_eigenvalue, self.minimum)
        return damping if self.maximum is None else ops.minimum(damping, self.maximum)

    def is_judged(self, step: Any, watched_until: Any) -> Any:
        """Whether a comparison is due before a step; boolean scalar tensor.

        Args:
            step: Number of the step.
            watched_until: Step up to which all are compared.
        """
        periodic = ops.logical_or(step <= watched_until, ops.equal(step % self.every, 0))
        return ops.logical_and(step > 0, periodic)

    def adapted(
        self, damping: Any, actual: Any, predicted: Any, *, first: Any, steps: Any
    ) -> tuple[Any, Any]:
        """The damping after one comparison, and whether the step is to be taken back.

        Args:
            damping: Damping so far, scalar tensor.
            actual: Change of the loss, scalar tensor.
            predicted: Change that the quadratic model predicted, negative; nothing is compared
                where it is not.
            first: Damping of the first step, scalar tensor.
            steps: Steps since the last comparison, scalar tensor.

        Returns:
            Two scalar tensors, the second boolean.
        """
        known = ops.logical_and(predicted < 0, ops.isfinite(predicted))
        ratio = actual / ops.where(known, predicted, -ops.ones_like(predicted))
        is_rejected = ops.logical_and(known, ops.logical_not(ratio >= -1.0))  # also if it is NaN
        factor = ops.power(self.decay, ops.cast(steps, "float32"))
        moved = ops.where(ratio > _GOOD, damping * factor, damping)
        moved = ops.where(ratio < 0.0, damping / factor, moved)
        moved = ops.where(is_rejected, damping * _REJECTED, moved)
        largest = _LARGEST * first if self.maximum is None else self.maximum
        return ops.clip(ops.where(known, moved, damping), self.minimum, largest), is_rejected

    def get_config(self) -> dict[str, Any]:
        return {
            "initial": self.initial,
            "decay": self.decay,
            "every": self.every,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LevenbergMarquardt:
        return cls(**config)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"LevenbergMarquardt({settings})"


class AdaptiveDamping:
    """State of `LevenbergMarquardt`.

    Args:
        rule: How the damping follows the steps.
        add_variable: Creates a variable of the optimizer.
    """

    def __init__(self, rule: LevenbergMarquardt, add_variable: AddVariable) -> None:
        self.rule = rule

        def variable(name: str, dtype: str, value: Any = 0) -> keras.Variable:
            # Keras before 3.13 multiplies constants, which booleans are not.
            initializer: Any = keras.initializers.Constant(value) if value else "zeros"
            return add_variable((), initializer, dtype=dtype, name=name)

        begin = rule.initial or _UNTIL_KNOWN
        self._value = variable("damping", "float32", begin)
        self._first = variable("first_damping", "float32", begin)
        self._predicted_change = variable("predicted_change", "float32")
        self._watched_until = variable("watched_until", "int64", rule.every)
        self._judged_at = variable("judged_at", "int64", -1)
        self._is_rejected = variable("is_rejected", "bool")
        self._rejected_steps = variable("rejected_steps", "int64")
        self._usual_loss = variable("usual_loss", "float32", math.inf)

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

    def is_due(self, step: Any, at_once: Any = False) -> Any:
        """Whether the step before this one is to be judged; boolean scalar tensor.

        A step is judged once. One that overflowed, with a loss scale, is none and does not count.

        Args:
            step: Number of the step to come.
            at_once: Whether it is high time: the loss is not finite any more, or has jumped.
        """
        due = self.rule.is_judged(step, tf.convert_to_tensor(self._watched_until))
        is_new = tf.not_equal(step, tf.convert_to_tensor(self._judged_at))
        return tf.logical_and(tf.logical_or(due, at_once), is_new)

    def has_jumped(self, loss: Any) -> Any:
        """Whether a loss is far above those of the steps before; boolean scalar tensor.

        Such a step is judged at once: until the next comparison is due, others would follow it.

        Args:
            loss: Loss of the present weights, scalar tensor.
        """
        usual = tf.convert_to_tensor(self._usual_loss)
        return loss - usual > _JUMP * tf.abs(usual)

    def note(self, loss: Any, counts: Any) -> None:
        """Takes a loss into the average that `has_jumped` compares with.

        Args:
            loss: Loss of the present weights, scalar tensor.
            counts: Whether they stay, and the loss is finite; boolean scalar tensor.
        """
        usual = tf.convert_to_tensor(self._usual_loss)
        mean = _DECAY_OF_LOSS * usual + (1.0 - _DECAY_OF_LOSS) * loss
        noted = tf.where(tf.math.is_finite(usual), mean, loss)
        self._usual_loss.assign(tf.where(counts, noted, usual))

    def expect(self, change: Any) -> None:
        """Notes the change of the loss that is predicted for the step to come."""
        self._predicted_change.assign(change)

    def watch_next(self, step: Any, is_wanted: Any) -> None:
        """Has the step to come judged, whatever the period, if that is wanted.

        Args:
            step: Number of the step to come.
            is_wanted: Boolean scalar tensor.
        """
        until = tf.convert_to_tensor(self._watched_until)
        self._watched_until.assign(tf.where(is_wanted, tf.maximum(until, step + 1), until))

    def judge(self, change: Any, step: Any) -> None:
        """Compares the change of the loss that a step made with what was expected.

        Args:
            change: Loss after the step minus loss before it, on the same batch. On a batch that
                the step was not computed from, steps that fit noise count as bad.
            step: Number of the step that follows.
        """
        since = step - tf.maximum(tf.convert_to_tensor(self._judged_at), 0)
        damping, is_rejected = self.rule.adapted(
            self.value,
            change,
            tf.convert_to_tensor(self._predicted_change),
            first=tf.convert_to_tensor(self._first),
            steps=tf.minimum(since, self.rule.every),
        )
        self._value.assign(damping)
        self._is_rejected.assign(is_rejected)
        self._judged_at.assign(step)

    def keep(self) -> None:
        """The last step stays without being judged."""
        self._is_rejected.assign(False)

    def taken_back(self, step: Any) -> None:
        """Notes that the step before this one was taken back."""
        self._predicted_change.assign(0.0)
        self._rejected_steps.assign(self.rejected_steps + 1)
        self._watched_until.assign(step + self.rule.every)
