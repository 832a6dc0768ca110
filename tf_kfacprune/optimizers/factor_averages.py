"""The part of `KFAC` that estimates the curvature: averages of factors, and their inverses."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import KroneckerBlock, LocationSample, Record
from tf_kfacprune.distribution import (
    cond,
    num_replicas,
    replica_id,
    sum_over_replicas,
    weighted_mean,
)
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers.block_states import STATES
from tf_kfacprune.optimizers.hyperparameters import Hyperparameter, value_at
from tf_kfacprune.optimizers.kfac_state import Binding, Layout

__all__ = ["FactorAverages"]


class FactorAverages(keras.optimizers.Optimizer):
    """Base of `KFAC`, which documents and checks the settings.

    Args:
        learning_rate: Step size, a float or a schedule.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`.
    """

    factor_decay: Hyperparameter
    factor_every: int
    inverse_every: int
    location_fraction: float
    inverse: str
    weight_sharing: str
    max_factor_dim: int | None
    large_factors: str
    shard_inverses: bool

    def __init__(self, learning_rate: Any, **kwargs: Any) -> None:
        super().__init__(learning_rate, **kwargs)
        self._layout = Layout([], 0)
        self._bound = Binding(None, {})

    def bind(
        self, blocks: Sequence[KroneckerBlock], reasons: Mapping[str, str] | None = None
    ) -> None:
        """Tells the optimizer which layers have Kronecker blocks; called before it is built.

        Args:
            blocks: Blocks whose statistics the model will hand to `update_factors`.
            reasons: Path of a variable -> why it is in no block; shown by `summary`.

        Raises:
            InvalidArgumentError: If the optimizer is built already, for other blocks.
        """
        if self.built:
            if [id(b.kernel) for b in self.blocks] != [id(b.kernel) for b in blocks]:
                raise InvalidArgumentError(
                    f"Optimizer {self.name!r} was built for the layers "
                    f"{[b.name for b in self.blocks]} and cannot be bound to "
                    f"{[b.name for b in blocks]}. Give each model an optimizer of its own, and a "
                    "new one after layers were frozen or freed."
                )
            return
        self._bound = Binding(tuple(blocks), reasons or {})

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        index_of = {id(v): i for i, v in enumerate(variables)}
        make = STATES[self.inverse]
        states = [
            make(block, index_of, self.add_variable, self.max_factor_dim, self.large_factors)
            for block in self._bound.blocks or ()
        ]
        self._layout = Layout(states, len(variables))
        # What makes the average unbiased: 1 - product of all decays so far.
        self._average_weight = self.add_variable((), dtype="float32", name="average_weight")

    @property
    def blocks(self) -> list[KroneckerBlock]:
        """The Kronecker blocks, in the order of the statistics that `update_factors` takes."""
        return [state.block for state in self._layout.states]

    @property
    def block_variables(self) -> list[keras.Variable]:
        """The trainable variables in Kronecker blocks, the order of `QuadraticForm`."""
        return [self._trainable_variables[i] for i in self._layout.in_blocks]

    @property
    def current_damping(self) -> Any:
        """The damping d at this step, a scalar tensor or a number."""
        raise NotImplementedError

    def factors_due(self) -> Any:
        """Boolean scalar tensor: whether the factors are to be updated at this step.

        That is every `factor_every` steps, and in the first half of the first period at steps 1, 2,
        4, 8 and so on: a network changes fastest in the beginning.
        """
        step = tf.convert_to_tensor(self.iterations)
        early = [1 << k for k in range((self.factor_every // 2).bit_length())]
        return tf.reduce_any([step % self.factor_every == 0, *(step == k for k in early)])

    def statistics(
        self, records: Sequence[Record], probes: Sequence[Sequence[Any]]
    ) -> list[list[Any]]:
        """What a batch says about the curvature, to be handed to `update_factors`.

        Args:
            records: Uses of the blocks' layers in one forward pass.
            probes: For each loss whose Fishers add up (one, unless labels are `"exact"`),
                per-example gradients, one per record.

        Returns:
            For each block `[A, G]` in the form in which they are kept, and for EKFAC the second
            moments in the eigenbasis.
        """
        found = []
        for j, state in enumerate(self._layout.states):
            uses = [k for k, r in enumerate(records) if r.layer is state.block.layer]
            found.append(
                state.statistics(
                    [records[k] for k in uses],
                    [[gradients[k] for k in uses] for gradients in probes],
                    reduce=self.weight_sharing == "reduce",
                    sample=self._location_sample(j),
                )
            )
        return found

    def _location_sample(self, j: int) -> LocationSample | None:
        """Where block j is looked at in this step; a function of the step, so nothing to save."""
        if self.location_fraction == 1.0:
            return None
        seed = tf.stack([tf.cast(tf.convert_to_tensor(self.iterations), "int32"), j])
        return LocationSample(self.location_fraction, tf.random.stateless_uniform((), seed))

    def update_factors(self, statistics: Sequence[Sequence[Any]], examples: Any = 1) -> None:
        """Averages in the statistics of a batch, and updates the inverses when they are due.

        Statistics with NaN or infinite entries are left out.

        Args:
            statistics: For each block `[A, G]`, as returned by `statistics`.
            examples: Number of examples that they are means over, a scalar tensor; under
                `tf.distribute`, those of this replica.
        """
        flat = weighted_mean([moment for block in statistics for moment in block], examples)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(f)) for f in flat])
        tf.cond(finite, lambda: self._average_in(flat), lambda: None)
        step = tf.convert_to_tensor(self.iterations)
        due = tf.logical_or(
            step < self.inverse_every, step % self.inverse_every < self.factor_every
        )
        cond(tf.logical_and(due, finite), self._update_inverses, lambda: None)

    def _average_in(self, flat: Sequence[Any]) -> None:
        decay = value_at(self.factor_decay, self.iterations)
        # Of moments that began anew with the inverses, all count the same until decay sets in.
        updates = tf.convert_to_tensor(self.iterations) % self.inverse_every // self.factor_every
        updates = tf.cast(updates, "float32")
        renewed_decay = tf.minimum(decay, updates / (updates + 1.0))
        states = self._layout.states
        renewed = {id(v) for state in states for v in state.renewed}
        averages = [v for state in states for v in state.averages]
        for variable, new in zip(averages, flat, strict=True):
            keep = renewed_decay if id(variable) in renewed else decay
            self.assign(variable, keep * tf.convert_to_tensor(variable) + (1.0 - keep) * new)
        weight = tf.convert_to_tensor(self._average_weight)
        self._average_weight.assign(1.0 - decay * (1.0 - weight))

    def _update_inverses(self) -> None:
        debias = 1.0 / tf.convert_to_tensor(self._average_weight)
        damping = self.current_damping
        if self.shard_inverses and num_replicas() > 1:
            values = self._sharded_inverses(debias, damping)
        else:
            states = self._layout.states
            values = [new for state in states for new in state.refreshed(debias, damping)]
        variables = [v for state in self._layout.states for v in state.inverting]
        for variable, new in zip(variables, values, strict=True):
            variable.assign(new)

    def _sharded_inverses(self, debias: Any, damping: Any) -> list[Any]:
        """New values of what inverts all blocks; block j is computed by replica `j % n` alone."""
        found: list[Any] = []
        for j, state in enumerate(self._layout.states):
            found += tf.cond(
                tf.equal(replica_id(), j % num_replicas()),
                functools.partial(state.refreshed, debias, damping),
                functools.partial(_zeros, state.inverting),
            )
        return sum_over_replicas(found)


def _zeros(variables: Sequence[keras.Variable]) -> list[Any]:
    return [tf.zeros(variable.shape, variable.dtype) for variable in variables]
