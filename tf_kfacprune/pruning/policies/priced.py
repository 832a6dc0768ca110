r"""Gates that are trained on loss and cost, at a price of cost that leads to the budget.

=================  ==========================================================  ======
symbol             meaning                                                     shape
=================  ==========================================================  ======
`p`                probability that each gate is open                          (n,)
`C_m(p)`           expected cost by measure m (MACs, params), relative         scalar
`c_m(t)`           cost the network should have at step t                      scalar
`lambda_m`         price of cost, the Lagrange multiplier                      scalar
=================  ==========================================================  ======

While pruning, the gates minimize `loss + sum_m lambda_m C_m(p)`, and with the relative excess
`e = log(C_m / c_m(t))`

    log lambda_m <- log lambda_m + k_i e          (dual ascent; |e| <= 1)
    price         = lambda_m exp(k_p e) / c_m(t)  (proportional term)

so that the price rises while the network is too big and falls when it overshoots. Dividing by
c_m(t) prices the *relative* cost: the last neurons of a tiny network are as closely fought over
as the first ones of a big network.

References:
    Gallego-Posada et al. 2022, "Controlled Sparsity via Constrained Optimization" (dual ascent on
    hard-concrete gates). Louizos et al. 2018 (expected cost).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import tensorflow as tf

from tf_kfacprune.distribution import num_replicas, sum_over_replicas
from tf_kfacprune.pruning.phases import target_fraction
from tf_kfacprune.pruning.policies.base import Policy, PolicyState
from tf_kfacprune.pruning.task import PruningTask

__all__ = ["HardConcreteGates", "PricedGates", "ProximalGates"]

_INITIAL_PRICE = 1e-2
_LOG_PRICE_RANGE = (math.log(1e-8), math.log(1e6))
# A network 10 % too big for a quarter of the pruning phase raises the price e-fold,
_INTEGRAL_GAIN = 40.0
_LARGEST_GAIN_PER_STEP = 1.0
_PROPORTIONAL_GAIN = 10.0
# Gates can cross their whole range several times within the pruning phase.
_GATE_TRAVEL = 60.0
_GATE_RATE_RANGE = (1e-3, 0.3)


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class HardConcreteGates(Policy):
    """Stochastic gates, trained on loss and cost.

    References:
        Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".
    """

    gate_kind: ClassVar[str] = "hard_concrete"

    def build(self, task: PruningTask, seed: int | None) -> PolicyState:
        return PricedGates(task, name="policy")


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class ProximalGates(Policy):
    """Deterministic gates in [0, 1], trained on loss and cost with projected steps."""

    gate_kind: ClassVar[str] = "deterministic"

    def build(self, task: PruningTask, seed: int | None) -> PolicyState:
        return PricedGates(task, name="policy")


class PricedGates(PolicyState):
    """State of both: Adam steps of the gates, dual ascent on the prices.

    Args:
        task: What is to be pruned and how far.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, task: PruningTask, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        self.gate_optimizer = keras.optimizers.Adam(_GATE_RATE_RANGE[0], name="gate_optimizer")
        self.gate_optimizer.build(task.gate_parameters)

        def state(name: str, value: float) -> keras.Variable:
            initializer = keras.initializers.Constant(value)
            return self.add_weight((), initializer, trainable=False, name=name)

        first = math.log(_INITIAL_PRICE)
        self.log_prices = {m: state(f"log_price_{m}", first) for m in task.budget.targets}
        self.prices = {m: state(f"price_{m}", 0.0) for m in task.budget.targets}

    def prepare(self, prune_steps: int) -> None:
        low, high = _GATE_RATE_RANGE
        self.gate_optimizer.learning_rate = min(max(_GATE_TRAVEL / prune_steps, low), high)

    def move(self, loss_gradients: Sequence[Any], passed: Any, prune_steps: Any) -> None:
        """One step of the gates on `loss + price * cost`, and one of the prices."""
        task = self._task
        with tf.GradientTape() as tape:
            openness = task.expected_openness()
            costs = {m: task.gated.cost.fraction(m, openness) for m in self.prices}
            priced = tf.add_n(
                [self._price(m, cost, passed, prune_steps) * cost for m, cost in costs.items()]
            )
        cost_gradients = tape.gradient(priced, [v.value for v in task.gate_parameters])
        summed = sum_over_replicas(loss_gradients)
        # The optimizer of Keras sums over the replicas once more.
        share = 1.0 / num_replicas()
        gradients = [share * (g + c) for g, c in zip(summed, cost_gradients, strict=True)]
        self.gate_optimizer.apply(gradients, task.gate_parameters)

    def _price(self, measure: str, expected: Any, passed: Any, prune_steps: Any) -> Any:
        """Updates lambda of one measure and returns the price of its cost, a constant."""
        wanted = target_fraction(self._task.budget.targets[measure], passed / prune_steps)
        actual = self._task.fraction(measure)
        # Probabilities react at once, the deterministic network is what has to arrive.
        excess = 0.5 * (tf.math.log(tf.stop_gradient(expected)) + tf.math.log(actual))
        # Without a bound, a network whose gates all close for a moment would lose its price.
        excess = tf.clip_by_value(excess - tf.math.log(wanted), -1.0, 1.0)
        log_price = tf.convert_to_tensor(self.log_prices[measure])
        gain = tf.minimum(_INTEGRAL_GAIN / prune_steps, _LARGEST_GAIN_PER_STEP)
        log_price = tf.clip_by_value(log_price + gain * excess, *_LOG_PRICE_RANGE)
        self.log_prices[measure].assign(log_price)
        price = tf.exp(log_price + _PROPORTIONAL_GAIN * excess)
        price = price / wanted
        self.prices[measure].assign(price)
        return price

    def scores(self) -> Any:
        """The parameters themselves: the further open, the better."""
        return self._task.parameters()

    def figures(self) -> dict[str, Any]:
        """The price of cost, as lambda."""
        single = len(self.prices) == 1
        return {
            "lambda" if single else f"lambda_{measure}": tf.convert_to_tensor(price)
            for measure, price in self.prices.items()
        }
