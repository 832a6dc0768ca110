"""Counts training steps, and those that were skipped because something was not finite."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.errors import NonFiniteError

__all__ = ["StepGuard"]


class StepGuard(keras.layers.Layer):
    """Step counters, saved with the model.

    Args:
        limit: Skipped steps in a row that end the training.
        **kwargs: Arguments of `keras.layers.Layer`.

    Attributes:
        step: Steps so far, skipped ones included.
        skipped: Skipped steps so far.
        longest: Most skipped steps in a row since the last `check`.
    """

    def __init__(self, limit: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit = limit

        def counter(name: str) -> keras.Variable:
            return self.add_weight((), "zeros", dtype="int64", trainable=False, name=name)

        self.step = counter("step")
        self.skipped = counter("skipped")
        self.in_a_row = counter("in_a_row")
        self.longest = counter("longest")
        self.built = True

    def count(self, finite: Any) -> None:
        """Records one step; called inside the training step."""
        skipped = tf.cast(tf.logical_not(finite), "int64")
        self.step.assign_add(1)
        self.skipped.assign_add(skipped)
        self.in_a_row.assign((tf.convert_to_tensor(self.in_a_row) + 1) * skipped)
        longest, in_a_row = (tf.convert_to_tensor(v) for v in (self.longest, self.in_a_row))
        self.longest.assign(tf.maximum(longest, in_a_row))

    def check(self) -> None:
        """Ends the training if too many steps in a row were skipped.

        Raises:
            NonFiniteError: If so.
        """
        longest = int(tf.convert_to_tensor(self.longest))
        self.longest.assign(0)
        if longest >= self.limit:
            raise NonFiniteError(
                f"The loss or its gradients were NaN or infinite in {longest} training steps in a "
                f"row (limit: max_skipped_steps={self.limit}). These steps were skipped, the "
                "parameters are those of the last good step. Check the data for NaN and the labels "
                "for values out of range; if both are fine, lower the learning rate."
            )
