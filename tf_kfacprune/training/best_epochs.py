"""Callbacks that compare epochs, and what they may compare while a network is being pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

__all__ = ["BestEpochs"]

# On the callback, which may live longer than one `fit`: the `best` that it came with.
_FIRST_BEST = "_best_before_landing"
# Raised by one at the end of an epoch, it is below every `patience`.
_NO_PATIENCE_LOST = -2


class BestEpochs:
    """Lets only epochs on the budget count for callbacks that look for the best one.

    A network that has not been pruned yet has the lowest loss. `EarlyStopping` would put its
    weights back, `ModelCheckpoint(save_best_only=True)` would keep it, `ReduceLROnPlateau` would
    take the rise of the loss during pruning for a plateau. So until the gates have settled nobody's
    patience is used up, and in the epoch in which they have, every such callback starts anew.

    Args:
        callbacks: All callbacks of a `fit`. Those with the attributes of Keras' own that watch a
            figure (`monitor` and `best`) are looked after.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        self._watched = [c for c in callbacks if hasattr(c, "monitor") and hasattr(c, "best")]
        self._is_whole = False

    @property
    def judge_batches(self) -> bool:
        """Whether there is one that looks in the middle of an epoch."""
        return any(getattr(c, "save_freq", "epoch") != "epoch" for c in self._watched)

    def begin_epoch(self, has_settled: bool, is_whole: bool) -> None:
        """To be called before the callbacks see the beginning of an epoch.

        Args:
            has_settled: Whether the gates have settled.
            is_whole: Whether they have, or will before the first step.
        """
        self._is_whole = is_whole
        self.before_judging(has_settled)

    def before_judging(self, has_settled: bool) -> None:
        """To be called before the callbacks judge an epoch, or a part of it.

        Args:
            has_settled: Whether the gates have settled.
        """
        for callback in self._watched:
            own = vars(callback)
            if not has_settled:
                own.setdefault(_FIRST_BEST, callback.best)
                _set(callback, wait=_NO_PATIENCE_LOST)
            elif _FIRST_BEST in own:
                best = own[_FIRST_BEST]
                _set(callback, best=best, wait=0, best_weights=None, best_epoch=0)
                # Figures of the training data are means over the epoch, from before landing too.
                if self._is_whole or callback.monitor.startswith("val_"):
                    del own[_FIRST_BEST]

    def end(self, has_settled: bool) -> None:
        """To be called before the callbacks see the end of the training.

        Args:
            has_settled: Whether the gates have settled; if not there are no best weights.
        """
        for callback in self._watched:
            if not has_settled:
                _set(callback, best_weights=None)


def _set(callback: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        if hasattr(callback, name):
            setattr(callback, name, value)
