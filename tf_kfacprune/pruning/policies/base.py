"""What closing policies have in common: their settings, and their state in a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import keras

from tf_kfacprune.curvature import Batch, CurvatureEstimator
from tf_kfacprune.pruning.task import PruningTask

__all__ = ["Policy", "PolicyState"]


class Policy:
    """How gates find out whether to close; subclasses are frozen dataclasses of settings.

    Attributes:
        gate_kind: The kind of gates that it moves, `"deterministic"` or `"hard_concrete"`.
        labels: Whose labels it looks at curvature with, or None if it does not.
    """

    gate_kind: ClassVar[str]
    labels: str | None = None

    def build(self, task: PruningTask, seed: int | None) -> PolicyState:
        """The state that carries the policy out.

        Args:
            task: What is to be pruned and how far.
            seed: Seed of what is random in the policy, or None.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The arguments, for serialization."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Policy:
        """Inverse of `get_config`."""
        return cls(**config)


class PolicyState(keras.layers.Layer):
    """State of a closing policy; a layer so that it is saved with the model.

    Attributes:
        is_switching: Whether gates are open or closed at any time, and nothing in between.

    Args:
        task: What is to be pruned and how far.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    is_switching = False

    def __init__(self, task: PruningTask, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._task = task
        self.built = True

    def prepare(self, prune_steps: int) -> None:
        """Called before the first step of a run.

        Args:
            prune_steps: Length of the prune phase.
        """

    def observe(self, estimator: CurvatureEstimator, batch: Batch) -> None:
        """Looks at a batch, in the training step; called before `move`.

        Args:
            estimator: What looks at the gated network.
            batch: The batch.
        """

    def move(self, loss_gradients: Sequence[Any], passed: Any, prune_steps: Any) -> None:
        """One step of the gates, in the training step; called in the prune phase only.

        Args:
            loss_gradients: Gradients of the loss with respect to the parameters of each source of
                gates; under `tf.distribute`, this replica's part of them.
            passed: Steps of the prune phase so far, a scalar float tensor.
            prune_steps: Its length, likewise.
        """
        raise NotImplementedError

    def scores(self) -> Any:
        """How much each gate deserves to stay open at the landing, shape `(num_gates,)`."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """What the progress bar shows of the policy."""
        return {}
