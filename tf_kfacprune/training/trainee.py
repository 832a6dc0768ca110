"""A network in training, with everything that belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from tf_kfacprune.curvature import CurvatureEstimator, ForwardState, NetworkBlocks
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.training.curvature_penalty import CurvaturePenalty

__all__ = ["Trainee", "call_network", "inner_optimizer"]


class Trainee:
    """What a training step works on; a plain object, so that Keras does not track it twice.

    A `PrunableModel` has one for its gated network, and later another one for the compact copy.

    Attributes:
        net: The network.
        variables: What the optimizer trains.
        optimizer: The optimizer, perhaps one that scales the loss.
        kfac: The same without what scales the loss if it is `KFAC`, or None.
        found: The Kronecker blocks of the network.
        estimator: What looks at its curvature.
        penalty: The penalty on its curvature, or None.
        has_constant_rate: Whether the learning rate is a number, not a schedule.
        is_gated: Whether gates may close in it.
        follows: The optimizer whose learning rate and count of steps this one takes over, or None.

    Args:
        net: As the attribute.
        variables: As the attribute.
        optimizer: As the attribute.
        found: As the attribute.
        estimator: As the attribute.
        penalty: As the attribute.
        gates: Non-trainable variables of gates, which training steps change on purpose.
        follows: As the attribute.
    """

    def __init__(
        self,
        net: keras.Model,
        variables: Sequence[keras.Variable],
        optimizer: keras.optimizers.Optimizer,
        found: NetworkBlocks,
        estimator: CurvatureEstimator,
        penalty: CurvaturePenalty | None = None,
        gates: Iterable[keras.Variable] = (),
        follows: keras.optimizers.Optimizer | None = None,
    ) -> None:
        self.net = net
        self.variables = list(variables)
        self.optimizer = optimizer
        inner = inner_optimizer(optimizer)
        self.kfac = inner if isinstance(inner, KFAC) else None
        # Keras serializes a schedule as a dictionary, a constant as a number.
        self.has_constant_rate = isinstance(inner.get_config().get("learning_rate"), float)
        self.found = found
        self.estimator = estimator
        self.penalty = penalty
        self._of_gates = list(gates)
        self.is_gated = bool(self._of_gates)
        self.follows = follows

    def bind_and_build(self) -> None:
        """Hands the Kronecker blocks to the optimizer and creates its variables.

        Before weights are loaded: an optimizer without variables would lose its state.
        """
        if self.kfac is not None:
            self.kfac.bind(self.found.blocks, self.found.reasons)
        if not self.optimizer.built:
            self.optimizer.build(self.variables)

    def forward_state(self) -> ForwardState:
        """What the next forward pass will change."""
        return ForwardState(self.net, ignore=self._of_gates)


def call_network(
    network: keras.Model, inputs: Any, training: bool | None = None, mask: Any = None
) -> Any:
    """Calls a network with the arguments that it knows; subclassed ones may know neither."""
    given = {"training": training} if network._call_has_training_arg else {}
    if mask is not None:
        given["mask"] = mask
    return network(inputs, **given)


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that takes the steps, inside of a loss-scaling one or not."""
    return getattr(optimizer, "inner_optimizer", optimizer)
