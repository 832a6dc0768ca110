"""Who decides about the learning rate of a settled network: the run, or a callback."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import keras

__all__ = ["OverwrittenRates", "sets_learning_rate"]

_SETTERS = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


def sets_learning_rate(callbacks: Sequence[keras.callbacks.Callback]) -> bool:
    """Whether there is one of Keras' callbacks that set the learning rate, or of a subclass.

    Args:
        callbacks: All callbacks of a `fit`.
    """
    return any(isinstance(callback, _SETTERS) for callback in callbacks)


class OverwrittenRates:
    """Warns once if another callback sets a learning rate that will not last.

    Args:
        callbacks: All callbacks of a `fit`.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        own = [c for c in callbacks if not type(c).__module__.startswith("keras.")]
        self._names = ", ".join(dict.fromkeys(type(c).__name__ for c in own or callbacks))
        self._rate: float | None = None
        self._is_told = False

    def note(self, rate: float | None) -> None:
        """Remembers the learning rate as the steps have left it.

        Args:
            rate: The learning rate, or None if it is not for callbacks to set.
        """
        self._rate = rate

    def compare(self, rate: float | None, name: str) -> None:
        """Warns if the rate has changed since `note`.

        Args:
            rate: The learning rate now; no step has changed it in between.
            name: Name of the model.
        """
        if self._is_told or self._rate is None or rate is None or rate == self._rate:
            return
        self._is_told = True
        warnings.warn(
            f"A callback has set the learning rate to {rate:.4g} ({self._names}). {name!r} lets it "
            "fall to zero along a cosine once its gates have settled, and overwrites what "
            "callbacks set. To let the callback decide, pass phases=kp.Phases(decay=False) to "
            "PrunableModel; LearningRateScheduler and ReduceLROnPlateau of Keras decide without "
            "that.",
            stacklevel=2,
        )
