"""Budgets: how much of the dense model's cost the compact model may have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import keras

from tf_kfacprune.errors import BudgetError

__all__ = ["Budget"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class Budget:
    """Upper bounds on the cost of the pruned network, as fractions of the dense model.

    Args:
        macs: Multiply-accumulates of all contractions for one example, in (0, 1].
        params: All weights, biases and normalization statistics included, in (0, 1].

    Raises:
        BudgetError: If no bound is given or one is outside (0, 1].

    Example:
        >>> budget = kp.Budget(macs=0.1)
    """

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise BudgetError(
                "A Budget needs at least one bound, such as Budget(macs=0.1). Received: none. "
                "Pass budget=None to train without pruning."
            )
        for measure, target in self.targets.items():
            if not isinstance(target, Real) or not 0.0 < float(target) <= 1.0:
                raise BudgetError(
                    f"Budget `{measure}` must be a fraction of the dense model in (0, 1]. "
                    f"Received: {measure}={target!r}"
                )

    @property
    def targets(self) -> dict[str, float]:
        """The bounds that were given, by measure."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def is_open(self) -> bool:
        """Whether every bound is 1, so that nothing has to be pruned."""
        return all(target == 1.0 for target in self.targets.values())

    def get_config(self) -> dict[str, Any]:
        """The arguments, for serialization."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Budget:
        """Inverse of `get_config`."""
        return cls(**config)
