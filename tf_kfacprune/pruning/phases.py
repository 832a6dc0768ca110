"""The phases of one training run: warm-up, prune, settle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import keras
from keras import ops

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.validation import is_number_in

__all__ = ["Phases", "target_fraction"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class Phases:
    """How the steps of one `fit` are divided; what is left after `warmup` and `prune` settles.

    `fit(epochs=more, initial_epoch=done)` prolongs a run. A further `fit` after its end trains the
    settled network with the learning rate that the optimizer then has.

    Args:
        warmup: Share of the steps during which gates are held open, in [0, 1).
        prune: Share of the steps during which gates close, in (0, 1). These are the expensive ones:
            the network is still whole. On LeNet-300-100, 0.1 to 0.35 led to the same errors.
        decay: Whether the learning rate falls to zero along a cosine while the network settles.
            Only a constant learning rate is decayed; a schedule is left alone. With a
            `LearningRateScheduler` or `ReduceLROnPlateau` among the callbacks of `fit` these
            decide; what others set is overwritten, with a warning: use `decay=False` with them.

    Raises:
        InvalidArgumentError: If the shares are out of range or leave nothing to settle.
    """

    warmup: float = 0.05
    prune: float = 0.2
    decay: bool = True

    def __post_init__(self) -> None:
        are_shares = is_number_in(self.warmup, "[0, 1)") and is_number_in(self.prune, "(0, 1)")
        if not (are_shares and self.warmup + self.prune < 1.0):
            raise InvalidArgumentError(
                "Phases need 0 <= warmup, 0 < prune and warmup + prune < 1, so that some steps are "
                f"left to settle. Received: warmup={self.warmup!r}, prune={self.prune!r}"
            )

    def boundaries(self, total_steps: int) -> tuple[int, int]:
        """Steps at which pruning starts and ends.

        Args:
            total_steps: Steps of the whole run.

        Returns:
            `(prune_start, prune_end)` with `prune_start < prune_end`; of two steps or more, at
            least the last one is left to settle.
        """
        start = min(round(self.warmup * total_steps), max(total_steps - 2, 0))
        end = min(round((self.warmup + self.prune) * total_steps), total_steps - 1)
        return start, max(start + 1, end)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for serialization."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Phases:
        """Inverse of `get_config`."""
        return cls(**config)


def target_fraction(target: Any, progress: Any, ramp: float = 0.7) -> Any:
    """Cost that the network should have on its way to the budget.

    Falls along a cubic from 1 to the budget during the first `ramp` of the pruning phase, then
    stays there, so that the last neurons have time to be exchanged for better ones.

    Args:
        target: The budget, a fraction in (0, 1].
        progress: Share of the pruning phase that has passed, in [0, 1].
        ramp: Share of the pruning phase after which the budget is reached.

    Returns:
        Scalar tensor in `[target, 1]`.

    References:
        Zhu & Gupta 2017, "To prune, or not to prune", equation 1.
    """
    remaining = ops.relu(1.0 - progress / ramp)
    return target + (1.0 - target) * remaining**3
