r"""Moves the price of cost so that the network arrives at its budget: dual ascent in a `fit`.

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

    log lambda_m <- log lambda_m + k_i e          (dual ascent)
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
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.distribution import num_replicas, sum_over_replicas
from tf_kfacprune.gates import GatedNetwork, GatePhase
from tf_kfacprune.pruning import Budget, GateGroups, Phases, land_on_budget, target_fraction

__all__ = ["BudgetController"]

_INITIAL_PRICE = 1e-2
_LOG_PRICE_RANGE = (math.log(1e-8), math.log(1e6))
# A network 10 % too big for a quarter of the pruning phase raises the price e-fold,
_INTEGRAL_GAIN = 40.0
_LARGEST_GAIN_PER_STEP = 1.0
_PROPORTIONAL_GAIN = 10.0
# Gates can cross their whole range several times within the pruning phase.
_GATE_TRAVEL = 60.0
_GATE_RATE_RANGE = (1e-3, 0.3)


class BudgetController(keras.layers.Layer):
    """State and rules of the three phases; a layer so that it is saved with the model.

    Args:
        gated: The gated network.
        budget: The budget.
        phases: How the steps are divided.
        groups: How many gates of each group may stay open; by default, at least one.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        gated: GatedNetwork,
        budget: Budget,
        phases: Phases,
        groups: GateGroups | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype="float32", **kwargs)
        self._plan = _Plan(gated, budget, phases, groups or GateGroups(gated))
        self.gate_optimizer = keras.optimizers.Adam(_GATE_RATE_RANGE[0], name="gate_optimizer")
        self.gate_optimizer.build([source.logits for source in gated.sources])

        def state(name: str, dtype: str, value: float = 0.0) -> keras.Variable:
            initializer = keras.initializers.Constant(value)
            return self.add_weight(
                shape=(), initializer=initializer, dtype=dtype, trainable=False, name=name
            )

        self.step = state("step", "int64")
        self.prune_start = state("prune_start", "int64")
        self.prune_end = state("prune_end", "int64")
        self.total_steps = state("total_steps", "int64")
        self.base_learning_rate = state("base_learning_rate", "float32")
        self.log_prices = {
            measure: state(f"log_price_{measure}", "float32", math.log(_INITIAL_PRICE))
            for measure in budget.targets
        }
        self.prices = {measure: state(f"price_{measure}", "float32") for measure in budget.targets}
        self.built = True

    @property
    def logits(self) -> list[keras.Variable]:
        """The trainable parameters of all gates."""
        return [source.logits for source in self._plan.gated.sources]

    def phase(self) -> Any:
        """The current `GatePhase`, a scalar tensor."""
        return tf.convert_to_tensor(self._plan.gated.sources[0].phase)

    @property
    def has_settled(self) -> bool:
        """Whether the network is on its budget for good."""
        return self._plan.budget.is_open or int(self.phase()) == GatePhase.SETTLED

    def plan(self, total_steps: int, learning_rate: float | None) -> None:
        """Lays out the phases over a run; a run that has settled before stays settled.

        Args:
            total_steps: Steps of the run, those done before a resume included.
            learning_rate: The constant learning rate to decay, or None to leave it alone.
        """
        if self.has_settled:
            return
        start, end = self._plan.phases.boundaries(total_steps)
        self.prune_start.assign(start)
        self.prune_end.assign(end)
        self.total_steps.assign(total_steps)
        if int(tf.convert_to_tensor(self.step)) == 0:
            decays = self._plan.phases.decay and learning_rate is not None
            self.base_learning_rate.assign(learning_rate if decays else 0.0)
            rate = _GATE_TRAVEL / (end - start)
            low, high = _GATE_RATE_RANGE
            self.gate_optimizer.learning_rate = min(max(rate, low), high)

    # ------------------------------------------------------------------ inside the training step

    def enter_phase(self) -> None:
        """Starts pruning or settling when its step has come; called before the forward pass."""
        if self._plan.budget.is_open:
            return
        step, phase = tf.convert_to_tensor(self.step), self.phase()
        starts = tf.logical_and(
            phase == int(GatePhase.HELD_OPEN), step >= tf.convert_to_tensor(self.prune_start)
        )
        ends = tf.logical_and(
            phase == int(GatePhase.PRUNING), step >= tf.convert_to_tensor(self.prune_end)
        )
        tf.cond(starts, self._start_pruning, lambda: None)
        tf.cond(ends, self.land, lambda: None)

    def _start_pruning(self) -> None:
        for source in self._plan.gated.sources:
            source.phase.assign(int(GatePhase.PRUNING))

    def land(self) -> None:
        """Ends the pruning phase: closes what does not fit and settles every gate."""
        gated = self._plan.gated
        scores = ops.concatenate([tf.convert_to_tensor(s.logits) for s in gated.sources])
        keep = land_on_budget(
            scores,
            self._plan.groups.of_gate,
            self._plan.groups.counts,
            lambda measure, gates: gated.cost.fraction(measure, gated.openness(gates)),
            self._plan.budget.targets,
        )
        first = 0
        for source in gated.sources:
            source.settle(keep[first : first + source.size])
            first += source.size

    def is_pruning(self) -> Any:
        """Boolean scalar tensor: whether gates are being moved."""
        return tf.equal(self.phase(), int(GatePhase.PRUNING))

    def move_gates(self, loss_gradients: list[Any]) -> None:
        """One step of the gates on `loss + price * cost`, and one of the prices.

        Args:
            loss_gradients: Gradients of the loss with respect to each of `logits`; under
                `tf.distribute`, this replica's part of them.
        """
        gated = self._plan.gated
        with tf.GradientTape() as tape:
            probability = ops.concatenate([s.open_probability() for s in gated.sources])
            openness = gated.openness(probability)
            costs = {m: gated.cost.fraction(m, openness) for m in self.prices}
            priced = tf.add_n([self._price(m, cost) * cost for m, cost in costs.items()])
        cost_gradients = tape.gradient(priced, [v.value for v in self.logits])
        loss_gradients = sum_over_replicas(loss_gradients)
        # The optimizer of Keras sums over the replicas once more.
        share = 1.0 / num_replicas()
        gradients = [share * (g + c) for g, c in zip(loss_gradients, cost_gradients, strict=True)]
        self.gate_optimizer.apply(gradients, self.logits)

    def _price(self, measure: str, expected: Any) -> Any:
        """Updates lambda of one measure and returns the price of its cost, a constant."""
        steps = tf.cast(tf.convert_to_tensor(self.prune_end - self.prune_start), "float32")
        passed = tf.cast(tf.convert_to_tensor(self.step - self.prune_start), "float32")
        wanted = target_fraction(self._plan.budget.targets[measure], passed / steps)
        actual = self.fraction(measure)
        # Probabilities react at once, the deterministic network is what has to arrive.
        excess = 0.5 * (tf.math.log(tf.stop_gradient(expected)) + tf.math.log(actual))
        excess -= tf.math.log(wanted)
        log_price = tf.convert_to_tensor(self.log_prices[measure])
        gain = tf.minimum(_INTEGRAL_GAIN / steps, _LARGEST_GAIN_PER_STEP)
        log_price = tf.clip_by_value(log_price + gain * excess, *_LOG_PRICE_RANGE)
        self.log_prices[measure].assign(log_price)
        price = tf.exp(log_price + _PROPORTIONAL_GAIN * tf.clip_by_value(excess, -1.0, 1.0))
        price = price / wanted
        self.prices[measure].assign(price)
        return price

    def learning_rate(self) -> Any:
        """The decayed learning rate while settling, a scalar tensor."""
        step = tf.convert_to_tensor(self.step)
        left = tf.cast(self.total_steps - self.prune_end, "float32")
        progress = tf.cast(step - tf.convert_to_tensor(self.prune_end), "float32") / left
        cosine = 0.5 * (1.0 + tf.cos(math.pi * tf.clip_by_value(progress, 0.0, 1.0)))
        return tf.convert_to_tensor(self.base_learning_rate) * cosine

    def decays_now(self) -> Any:
        """Boolean scalar tensor: whether `learning_rate` applies at this step."""
        settled = tf.equal(self.phase(), int(GatePhase.SETTLED))
        return tf.logical_and(settled, tf.convert_to_tensor(self.base_learning_rate) > 0)

    # ------------------------------------------------------------------ figures

    def _actual_openness(self) -> Any:
        gated = self._plan.gated
        values = ops.concatenate([source.deterministic_values() for source in gated.sources])
        return gated.openness(ops.cast(values > 0, "float32"))

    def fraction(self, measure: str) -> Any:
        """Cost of the deterministic network relative to the dense one, a scalar tensor."""
        return self._plan.gated.cost.fraction(measure, self._actual_openness())

    def figures(self) -> dict[str, Any]:
        """What the progress bar shows: expected and actual cost, neurons left, prices."""
        gated = self._plan.gated
        actual = self._actual_openness()
        expected = gated.openness(ops.concatenate([s.open_probability() for s in gated.sources]))
        result = {"neurons": ops.sum(actual)}
        for measure in gated.cost.measures:
            result[measure] = gated.cost.fraction(measure, actual)
            result[f"expected_{measure}"] = gated.cost.fraction(measure, expected)
        single = len(self.prices) == 1
        for measure, price in self.prices.items():
            result["lambda" if single else f"lambda_{measure}"] = tf.convert_to_tensor(price)
        return result


class _Plan:
    """What the controller works on; plain, so that Keras does not track the network twice."""

    def __init__(
        self, gated: GatedNetwork, budget: Budget, phases: Phases, groups: GateGroups
    ) -> None:
        self.gated = gated
        self.budget = budget
        self.phases = phases
        self.groups = groups
