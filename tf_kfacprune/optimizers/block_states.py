"""What the optimizer keeps for one Kronecker block, and how it preconditions with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import KroneckerBlock, Record
from tf_kfacprune.linalg import factored_damping
from tf_kfacprune.optimizers.factors import (
    AddVariable,
    DiagonalizedFactor,
    Factor,
    InvertedFactor,
)
from tf_kfacprune.optimizers.split_factors import (
    SplitDiagonalizedFactor,
    SplitFactor,
    SplitInvertedFactor,
)

__all__ = ["STATES", "BlockState", "CholeskyState", "EKFACState", "EigenState"]

_TINY = 1e-30


class BlockState:
    """Optimizer variables of one Kronecker block; subclasses say how it preconditions.

    Args:
        block: The Kronecker block.
        index_of: Identity of a variable -> its place among those of the optimizer.
        add_variable: Creates a variable of the optimizer.
        max_factor_dim: Dimension above which a factor is not kept as a whole, or None.
        large_factors: What is kept of it: `"diagonal"`, or `"split"` into diagonal blocks.

    Attributes:
        averages: The variables that `statistics` are averaged into, in the same order.
        renewed: Those of them that begin anew whenever the block is inverted.
        capped: Which of "A" and "G" is not held as a whole for its size.
    """

    factor_class: type[Factor]
    split_class: type[SplitFactor]

    def __init__(
        self,
        block: KroneckerBlock,
        index_of: Mapping[int, int],
        add_variable: AddVariable,
        max_factor_dim: int | None,
        large_factors: str,
    ) -> None:
        self.block = block
        self.indices = [index_of[id(variable)] for variable in block.variables]
        self.name = block.name.replace("/", "_")
        cap = max_factor_dim or max(block.n_a, block.n_out)

        def factor(kind: str, n: int, is_diagonal: bool) -> Any:
            name, groups = f"{self.name}_{kind}", block.group_shape
            if n > cap and not is_diagonal and large_factors == "split":
                return self.split_class(name, groups, n, cap, add_variable)
            return self.factor_class(name, groups, n, is_diagonal or n > cap, add_variable)

        self.a = factor("a", block.n_a, block.a_is_diagonal)
        self.g = factor("g", block.n_out, False)
        self.averages = [*self.a.averages, *self.g.averages]
        self.renewed: list[keras.Variable] = []
        sizes = (("A", 0 if block.a_is_diagonal else block.n_a), ("G", block.n_out))
        self.capped = [label for label, n in sizes if n > cap]

    @property
    def variables(self) -> list[keras.Variable]:
        """Factors and what inverts them."""
        return [*self.a.variables, *self.g.variables]

    @property
    def bytes(self) -> int:
        """Memory of factors and what inverts them."""
        return 4 * sum(math.prod(v.shape) for v in self.variables)

    def statistics(
        self, records: Sequence[Record], probes: Sequence[Sequence[Any]], **how: Any
    ) -> list[Any]:
        """What one batch says about the block.

        Args:
            records: Uses of the block's layer.
            probes: For each loss whose Fishers add up, per-example gradients, one per use.
            **how: `reduce` and `sample` of `KroneckerBlock.factors`.

        Returns:
            One tensor per variable in `averages`.
        """
        a, g = self.block.factors(records, probes, **how)
        return [*self.a.statistics(a), *self.g.statistics(g)]

    def traces(self, debias: Any) -> tuple[Any, Any]:
        """`tr F` and `tr F^2` of `F = A (x) G`, scalars, the sums over groups k.

        Args:
            debias: Factor that makes the averages unbiased.
        """
        a, g = self.a.debiased(debias), self.g.debiased(debias)
        size = float(self.block.n_a * self.block.n_out)
        means = self.a.mean_eigenvalue(a) * self.g.mean_eigenvalue(g)
        squares = self.a.mean_square_eigenvalue(a) * self.g.mean_square_eigenvalue(g)
        return size * tf.reduce_sum(means), size * tf.reduce_sum(squares)

    @property
    def inverting(self) -> list[keras.Variable]:
        """The variables that invert the block."""
        return [*self.a.inverting, *self.g.inverting]

    def refreshed(self, debias: Any, damping: Any) -> list[Any]:
        """New values for `inverting`.

        Args:
            debias: Factor that makes the averages unbiased.
            damping: d, scalar.
        """
        raise NotImplementedError

    def precondition(self, matrix: Any, damping: Any) -> Any:
        """P of a gradient matrix V.

        Args:
            matrix: V, shape `(*k, n_a, n_out)`.
            damping: d, scalar.
        """
        raise NotImplementedError


class CholeskyState(BlockState):
    """`P = (A + pi sqrt(d) I)^-1 V (G + sqrt(d)/pi I)^-1`, d as of the last refresh.

    References:
        Martens & Grosse 2015, section 6.3.
    """

    factor_class = InvertedFactor
    split_class = SplitInvertedFactor

    def refreshed(self, debias: Any, damping: Any) -> list[Any]:
        a = self.a.debiased(debias)
        g = self.g.debiased(debias)
        means = self.a.mean_eigenvalue(a), self.g.mean_eigenvalue(g)
        damping_a, damping_g = factored_damping(*means, damping)
        return [*self.a.inverted(a, damping_a), *self.g.inverted(g, damping_g)]

    def precondition(self, matrix: Any, damping: Any) -> Any:
        return self.g.solve_right(self.a.solve_left(matrix))


class EigenState(BlockState):
    """`P = Q_A [Q_A^T V Q_G / (s_A s_G^T + d)] Q_G^T`: damping that is not factored."""

    factor_class = DiagonalizedFactor
    split_class = SplitDiagonalizedFactor

    def refreshed(self, debias: Any, damping: Any) -> list[Any]:
        a = self.a.debiased(debias)
        g = self.g.debiased(debias)
        return [*self.a.diagonalized(a), *self.g.diagonalized(g)]

    def precondition(self, matrix: Any, damping: Any) -> Any:
        rotated = self.g.rotate_right(self.a.rotate_left(matrix))
        scaled = rotated / (self.curvature() + damping + _TINY)
        return self.g.rotate_right(self.a.rotate_left(scaled, back=True), back=True)

    def curvature(self) -> Any:
        """The block's diagonal in the eigenbasis, shape `(*k, n_a, n_out)`."""
        return _outer(self.a.eigenvalues, self.g.eigenvalues)


class EKFACState(EigenState):
    """`EigenState` with `E (Q_A^T grad Q_G)^2` over single examples for `s_A s_G^T`.

    Blocks that are not contractions keep `s_A s_G^T`.

    References:
        George et al. 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
        Eigenbasis", section 3.
    """

    def __init__(self, block: KroneckerBlock, *args: Any) -> None:
        super().__init__(block, *args)
        if block.is_contraction:
            add_variable = args[1]
            shape = (*block.group_shape, block.n_a, block.n_out)
            name = f"{self.name}_moments"
            self.renewed = [add_variable(shape, "ones", dtype="float32", name=name)]
            self.averages += self.renewed

    @property
    def variables(self) -> list[keras.Variable]:
        return [*super().variables, *self.renewed]

    def statistics(
        self, records: Sequence[Record], probes: Sequence[Sequence[Any]], **how: Any
    ) -> list[Any]:
        found = super().statistics(records, probes, **how)
        if self.block.is_contraction:
            found.append(tf.add_n([self._moments(records, probe) for probe in probes]))
        return found

    def _moments(self, records: Sequence[Record], gradients: Sequence[Any]) -> Any:
        """Second moments of the examples' own gradients in the eigenbasis."""
        rotated: Any = 0.0
        for record, g in zip(records, gradients, strict=True):
            rows_a = tf.cast(self.block.homogeneous(self.block.rows_a(record)), "float32")
            rows_g = tf.cast(self.block.rows_g(record, g), "float32")
            rows_a, rows_g = self.a.rotate_rows(rows_a), self.g.rotate_rows(rows_g)
            rotated += tf.matmul(rows_a, rows_g, transpose_a=True)
        return tf.reduce_mean(tf.square(rotated), axis=-3)

    @property
    def inverting(self) -> list[keras.Variable]:
        return [*super().inverting, *self.renewed]

    def refreshed(self, debias: Any, damping: Any) -> list[Any]:
        found = super().refreshed(debias, damping)
        if self.block.is_contraction:
            # In a new basis the old moments mean nothing; K-FAC's own are the best guess.
            count = len(self.a.inverting)
            a = self.a.eigenvalues_among(found[:count])
            found.append(_outer(a, self.g.eigenvalues_among(found[count:])))
        return found

    def curvature(self) -> Any:
        if not self.block.is_contraction:
            return super().curvature()
        return tf.convert_to_tensor(self.renewed[0])


def _outer(left: Any, right: Any) -> Any:
    return left[..., :, None] * right[..., None, :]


STATES: dict[str, type[BlockState]] = {
    "cholesky": CholeskyState,
    "eigen": EigenState,
    "ekfac": EKFACState,
}
