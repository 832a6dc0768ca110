"""What `compile` was told, digested. A plain object: Keras would track its parts a second time."""

from __future__ import annotations

import math
from typing import Any

import keras

from tf_kfacprune.curvature import Objective, exact_likelihoods, sampled_likelihood
from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["Compiled", "inner_optimizer"]


class Compiled:
    """The likelihoods of the loss, and the kind of learning rate.

    Attributes:
        sampled: Likelihood of labels sampled from the model, or None.
        exact: Likelihoods that make up the Fisher exactly, or None.
        reason: Why there are none, or None.
        constant_learning_rate: Whether the learning rate is a number.

    Args:
        loss: As given to `compile`.
        optimizer: The optimizer that takes the steps.
        weights: `loss_weights` as given to `compile`.
        outputs: Number of outputs of the network; Keras applies a single loss to each.
    """

    def __init__(
        self,
        loss: Any,
        optimizer: keras.optimizers.Optimizer,
        weights: Any = None,
        outputs: int = 1,
    ) -> None:
        self._losses = keras.tree.flatten(loss)
        self._is_single = len(self._losses) == 1 and outputs == 1
        if self._is_single:
            (loss,) = self._losses
        found: Any = sampled_likelihood(loss) if self._is_single else "several losses or outputs"
        self._weight = _single(weights) if self._is_single else 1.0
        if self._weight <= 0 and not isinstance(found, str):
            found = f"the weight of the loss is {self._weight}, not positive"
        self.sampled = None if isinstance(found, str) else self._weighted(found)
        self.exact = None if isinstance(found, str) else self._weighted(exact_likelihoods(loss))
        self.reason = found if isinstance(found, str) else None
        # Keras serializes a schedule as a dictionary, a constant as a number.
        self.constant_learning_rate = isinstance(optimizer.get_config()["learning_rate"], float)

    def _weighted(self, likelihood: Any) -> Any:
        """A likelihood whose Fisher is that of the weighted loss: gradients enter it squared."""
        if self._weight == 1.0:
            return likelihood
        root = math.sqrt(self._weight)
        return lambda *args: keras.tree.map_structure(lambda nll: root * nll, likelihood(*args))

    def objective(self) -> Objective:
        """The loss as the objective of the quadratic model.

        Raises:
            InvalidArgumentError: If there are several losses or outputs.
        """
        if not self._is_single:
            raise InvalidArgumentError(
                "The quadratic model (learning_rate='auto' or damping=LevenbergMarquardt(...)) "
                f"needs one loss on one output. Received: the losses {self._losses!r}, or several "
                "outputs. Use a fixed learning rate and a fixed damping, or add the losses up in "
                "one of your own."
            )
        return Objective(self._losses[0], self._weight)

    def check_reduction(self) -> None:
        """Refuses losses that are not means over the batch.

        Raises:
            InvalidArgumentError: If there is one.
        """
        for loss in self._losses:
            if getattr(loss, "reduction", None) in ("sum", "none"):
                raise InvalidArgumentError(
                    "KFAC needs losses that are means over the batch: steps would be too long or "
                    f"too short by its size. Received: {type(loss).__name__} with reduction="
                    f"{loss.reduction!r}. Use the default, 'sum_over_batch_size'."
                )


def _single(weights: Any) -> float:
    """The weight of the only loss."""
    flat = keras.tree.flatten(weights)
    return float(flat[0]) if len(flat) == 1 and flat[0] is not None else 1.0


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that takes the steps, inside of a loss-scaling one or not."""
    return getattr(optimizer, "inner_optimizer", optimizer)
