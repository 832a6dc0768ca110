"""The curvature that `KFAC` keeps: averages of Kronecker factors, and what inverts them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import KroneckerBlock, LocationSample, Look
from tf_kfacprune.distribution import num_replicas, replica_id, sum_over_replicas
from tf_kfacprune.optimizers.factors import AddVariable, Factor
from tf_kfacprune.optimizers.preconditioners import PRECONDITIONERS, refreshed
from tf_kfacprune.optimizers.steps import dot

__all__ = ["KroneckerCurvature"]

NO_BLOCK = "not a kernel or bias of a layer with a Kronecker block"
NOT_BOUND = "the model does not hand Kronecker factors to its optimizer"


class KroneckerCurvature:
    """Kronecker blocks of an optimizer's variables; a plain object, for Keras tracks the variables.

    Attributes:
        states: One preconditioner per block.
        in_blocks: Places of the variables in blocks among those of the optimizer.
        rest: Places of the others.

    Args:
        blocks: The blocks, or None if the model handed none over.
        reasons: Path of a variable -> why it is in no block.
        variables: The optimizer's variables.
        add_variable: Creates a variable of the optimizer.
        inverse: A name in `PRECONDITIONERS`.
        max_factor_dim: Dimension above which a factor is not kept as a whole, or None.
        large_factors: `"diagonal"` or `"split"`.
    """

    def __init__(
        self,
        blocks: Sequence[KroneckerBlock] | None,
        reasons: Mapping[str, str],
        variables: Sequence[keras.Variable],
        add_variable: AddVariable,
        *,
        inverse: str,
        max_factor_dim: int | None,
        large_factors: str,
    ) -> None:
        index_of = {id(v): i for i, v in enumerate(variables)}
        make = PRECONDITIONERS[inverse]
        self.states = [
            make(block, index_of, add_variable, max_factor_dim, large_factors)
            for block in blocks or ()
        ]
        self.in_blocks = [index for state in self.states for index in state.indices]
        members = set(self.in_blocks)
        self.rest = [i for i in range(len(variables)) if i not in members]
        self._variables = variables
        self._is_bound = blocks is not None
        self._reasons = dict(reasons)
        # What makes the average unbiased: 1 - product of all decays so far.
        self._average_weight = add_variable((), dtype="float32", name="average_weight")

    @property
    def is_known(self) -> Any:
        """Whether any factors have been averaged in, boolean scalar tensor."""
        return tf.convert_to_tensor(self._average_weight) > 0.0

    @property
    def debias(self) -> Any:
        """What averages are to be multiplied with, scalar tensor; 0 before the first of them."""
        return tf.math.divide_no_nan(1.0, tf.convert_to_tensor(self._average_weight))

    def statistics(
        self, look: Look, *, reduce: bool, location_fraction: float, step: Any
    ) -> list[Any]:
        """What a batch says about the curvature: a tensor for every average.

        Args:
            look: A pass that recorded the blocks' layers.
            reduce: K-FAC reduce instead of expand.
            location_fraction: Share of the locations that are looked at.
            step: Number of the step, which decides about the locations.
        """
        found: list[Any] = []
        for j, state in enumerate(self.states):
            sample = None
            if location_fraction < 1.0:  # a function of the step, so nothing to save
                seed = tf.stack([tf.cast(step, "int32"), j])
                noise = tf.random.stateless_uniform((), seed)
                sample = LocationSample(location_fraction, noise)
            found += state.statistics(look, reduce=reduce, sample=sample)
        return found

    def average_in(self, statistics: Sequence[Any], decay: Any, decay_of_moments: Any) -> None:
        """Adds the statistics of one batch to the averages.

        Args:
            statistics: As from `statistics`.
            decay: Weight of the past.
            decay_of_moments: The same for moments in eigenbases, which begin anew with these.
        """
        moments = {id(state.moments) for state in self.states if state.moments is not None}
        averages = [v for state in self.states for v in state.averages]
        for variable, new in zip(averages, statistics, strict=True):
            keep = decay_of_moments if id(variable) in moments else decay
            variable.assign(keep * tf.convert_to_tensor(variable) + (1.0 - keep) * new)
        weight = tf.convert_to_tensor(self._average_weight)
        self._average_weight.assign(1.0 - decay * (1.0 - weight))

    def update_inverses(self, damping: Any, *, is_sharded: bool) -> None:
        """Inverts all blocks anew.

        Args:
            damping: d, scalar.
            is_sharded: Whether each replica inverts some blocks only and they are exchanged.
        """
        debias = self.debias
        variables = [v for state in self.states for v in state.inverting]
        if is_sharded and num_replicas() > 1:
            values = self._sharded_inverses(debias, damping)
        else:
            values = refreshed(self.states, debias, damping)
        for variable, new in zip(variables, values, strict=True):
            variable.assign(new)

    def _sharded_inverses(self, debias: Any, damping: Any) -> list[Any]:
        """Block j is inverted by replica `j % n` alone."""

        def share_of(replica: int) -> list[Any]:
            values: list[Any] = []
            own = iter(refreshed(self.states[replica :: num_replicas()], debias, damping))
            for j, state in enumerate(self.states):
                is_own = j % num_replicas() == replica
                values += [
                    next(own) if is_own else tf.zeros(v.shape, v.dtype) for v in state.inverting
                ]
            return values

        branches = [functools.partial(share_of, r) for r in range(num_replicas())]
        return sum_over_replicas(tf.switch_case(replica_id(), branches))

    def preconditioned(self, gradients: Sequence[Any], damping: Any) -> list[Any]:
        """Preconditioned gradients P of what is in blocks, others as they are.

        Args:
            gradients: One per variable of the optimizer, or None.
            damping: d, scalar.
        """
        found = list(gradients)
        for state in self.states:
            tensors = [gradients[i] for i in state.indices]
            if all(g is not None for g in tensors):
                step = state.precondition(self._matrix(state, tensors), damping)
                for index, tensor in zip(state.indices, state.block.from_matrix(step), strict=True):
                    found[index] = tensor
        return found

    def form(self, directions: Sequence[Sequence[Any]]) -> Any:
        """Products `D^T F D` of the averaged curvature with directions, shape `(r, r)`.

        Args:
            directions: Each one tensor per variable in blocks, in the order of `in_blocks`.
        """
        debias = self.debias
        matrices: list[list[Any]] = [[] for _ in directions]
        products: list[list[Any]] = [[] for _ in directions]
        start = 0
        for state in self.states:
            end = start + len(state.indices)
            for k, direction in enumerate(directions):
                matrix = self._matrix(state, direction[start:end])
                matrices[k].append(matrix)
                products[k].append(state.multiply(matrix, debias))
            start = end
        return tf.stack([tf.stack([dot(p, q) for q in products]) for p in matrices])

    @staticmethod
    def _matrix(state: Any, tensors: Sequence[Any]) -> Any:
        return state.block.to_matrix([tf.cast(t, "float32") for t in tensors])

    def typical_eigenvalue(self) -> Any:
        """`tr F^2 / tr F`, scalar tensor; 0 where no curvature is known."""
        traces = [state.traces(self.debias) for state in self.states]
        plain, squared = (tf.add_n(list(each)) for each in zip(*traces, strict=True))
        return tf.math.divide_no_nan(squared, plain)

    def summary(self, name: str) -> Iterator[str]:
        """What takes K-FAC steps, with memory, and what takes Adam steps, with the reason.

        Args:
            name: Name of the optimizer.
        """
        yield f"{name}: {len(self.states)} Kronecker blocks"
        for state in self.states:
            block = state.block
            groups = f"{block.group_shape[0]} x " if block.group_shape else ""
            size = f"A {groups}{_size(state.a)}, G {groups}{_size(state.g)}"
            note = f"  above max_factor_dim: {', '.join(state.capped)}" * bool(state.capped)
            yield f"  {block.name:<24} {size:<36} {_mebibytes(state.bytes)}{note}"
        total = sum(state.bytes for state in self.states)
        yield f"  factors and inverses in all: {_mebibytes(total)}"
        yield f"Adam steps: {len(self.rest)} variables"
        for index in self.rest:
            variable = self._variables[index]
            count = f"{math.prod(variable.shape):,} parameters"
            reason = self._reasons.get(variable.path, NO_BLOCK) if self._is_bound else NOT_BOUND
            yield f"  {variable.path:<32} {count:<20} {reason}"


def _size(factor: Factor) -> str:
    if len(factor.sizes) > 1:
        most = max(factor.sizes)
        return f"{len(factor.sizes)} blocks of up to {most}x{most}"
    return f"diag {factor.n}" if factor.is_diagonal else f"{factor.n}x{factor.n}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
