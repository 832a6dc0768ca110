"""Hyper-parameters that are numbers or schedules, and damping that adapts itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops

from tf_kfacprune.validation import require, require_count

__all__ = ["Hyperparameter", "LevenbergMarquardt", "check_hyperparameter", "value_at"]

Hyperparameter: TypeAlias = "float | keras.optimizers.schedules.LearningRateSchedule"
Schedule = keras.optimizers.schedules.LearningRateSchedule

_GOOD = 0.25  # share of the predicted decrease on new examples above which damping falls

_RELATIVE = 30.0  # first damping in units of the mean eigenvalue of the curvature


def check_hyperparameter(
    owner: str, name: str, value: Any, is_valid: Callable[[Any], bool], expected: str
) -> None:
    """Checks a number; a schedule is checked to be one.

    Raises:
        InvalidArgumentError: Naming the argument, its value and what was expected.
    """
    if isinstance(value, Schedule):
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(owner, is_number and is_valid(value), name, f"{expected}, or a schedule", value)


def value_at(value: Hyperparameter, step: Any) -> Any:
    """The value of a hyper-parameter at a step: a number, or a scalar tensor."""
    return ops.cast(value(step), "float32") if isinstance(value, Schedule) else value


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class LevenbergMarquardt:
    """Damping that follows what steps do to examples they were not computed from.

    Every `every` steps the change of the loss that a step made on the *next* batch is compared
    with the change that its damped quadratic model predicted on its own. Where the loss fell by
    more than a quarter of the prediction the damping is multiplied by `decay ** every`, where it
    rose it is divided by it.

    Levenberg and Marquardt judge a step on the batch it was computed from. There, a step that fits
    the noise of the batch looks perfect, and the damping vanishes until training diverges; on new
    examples even a good step keeps only part of what it promised, hence the lower thresholds.

    Args:
        initial: Damping to begin with, > 0, in units of the curvature of the compiled loss. None
            means 30 times the mean eigenvalue of the first factors, whatever the scale of loss and
            inputs.
        decay: Factor per step, in (0, 1).
        every: Steps between comparisons, an integer >= 1; each costs one forward pass.
        minimum: Smallest damping, > 0.
        maximum: Largest damping.

    Raises:
        InvalidArgumentError: If an argument is out of range.

    Example:
        >>> optimizer = kp.KFAC("auto", damping=kp.LevenbergMarquardt(initial=0.1))

    References:
        Martens & Grosse 2015, section 6.5 (decay 19/20, every 5 steps; on one batch).
    """

    def __init__(
        self,
        initial: float | None = None,
        decay: float = 0.95,
        every: int = 5,
        minimum: float = 1e-8,
        maximum: float = 1e3,
    ) -> None:
        check = functools.partial(require, "LevenbergMarquardt")
        check(initial is None or initial > 0, "initial", "> 0 or None", initial)
        check(0 < decay < 1, "decay", "in (0, 1)", decay)
        require_count("LevenbergMarquardt", "every", every)
        least = maximum if initial is None else initial
        check(0 < minimum <= least, "minimum", "> 0, <= initial and <= maximum", minimum)
        check(initial is None or maximum >= initial, "maximum", ">= initial", maximum)
        self.initial = initial
        self.decay = decay
        self.every = every
        self.minimum = minimum
        self.maximum = maximum

    def beginning(self, mean_eigenvalue: Any) -> Any:
        """The damping to begin with where `initial` is None, scalar tensor.

        Args:
            mean_eigenvalue: Of the Kronecker-factored curvature, scalar tensor.
        """
        return ops.clip(_RELATIVE * mean_eigenvalue, self.minimum, self.maximum)

    def adapted(self, damping: Any, actual: Any, predicted: Any) -> Any:
        """The damping after one comparison.

        Args:
            damping: Damping so far, scalar tensor.
            actual: Change of the loss, scalar tensor.
            predicted: Change that the quadratic model predicted, negative.

        Returns:
            Scalar tensor; `damping` where the ratio of the two is undefined.
        """
        ratio = actual / ops.where(predicted < 0, predicted, ops.ones_like(predicted))
        known = ops.logical_and(predicted < 0, ops.isfinite(predicted))
        # A loss that is no number any more is as bad a fit as there can be.
        ratio = ops.where(ops.isfinite(ratio), ratio, -ops.ones_like(ratio))
        factor = self.decay**self.every
        lower, higher = damping * factor, damping / factor
        moved = ops.where(ratio > _GOOD, lower, ops.where(ratio < 0.0, higher, damping))
        return ops.clip(ops.where(known, moved, damping), self.minimum, self.maximum)

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
