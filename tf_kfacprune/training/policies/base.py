"""The interface of closing policies, as the training step sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from tf_kfacprune.training.pruning_plan import PruningPlan

__all__ = ["PolicyState"]


class PolicyState(keras.layers.Layer):
    """State of a closing policy; a layer so that it is saved with the model.

    Args:
        plan: What is to be pruned and how far.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, plan: PruningPlan, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._plan = plan
        self.built = True

    def prepare(self, prune_steps: int) -> None:
        """Called before the first step of a run.

        Args:
            prune_steps: Length of the prune phase.
        """

    def observe(self, x: Any, mean_losses: Callable[[Any], Sequence[Any]]) -> None:
        """Looks at a batch, in the training step; called before `move`.

        Args:
            x: Batch of inputs.
            mean_losses: Maps outputs to the losses whose curvature is meant.
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
