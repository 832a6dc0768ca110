"""What the optimizer keeps for one Kronecker block, and how it preconditions with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.curvature import KroneckerBlock, Look, Uses
from tf_kfacprune.linalg import factored_damping
from tf_kfacprune.optimizers.factors import AddVariable, Factor, by_size, decomposed, inverted

__all__ = ["PRECONDITIONERS", "Preconditioner", "refreshed"]

_TINY = 1e-30


class Preconditioner:
    """Optimizer variables of one Kronecker block; subclasses say how it preconditions.

    Attributes:
        block: The Kronecker block.
        indices: Places of its variables among those of the optimizer.
        a: Factor A.
        g: Factor G.
        moments: Second moments in the eigenbasis (EKFAC), or None.
        capped: Which of "A" and "G" is not held as a whole for its size.

    Args:
        block: As the attribute.
        index_of: Identity of a variable -> its place among those of the optimizer.
        add_variable: Creates a variable of the optimizer.
        max_factor_dim: Dimension above which a factor is not kept as a whole, or None.
        large_factors: What is kept of it: `"diagonal"`, or `"split"` into diagonal blocks.
    """

    kind: str
    moments: keras.Variable | None = None

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

        def factor(kind: str, n: int, is_diagonal: bool) -> Factor:
            return Factor.of(
                f"{self.name}_{kind}",
                block.group_shape,
                n,
                is_diagonal=is_diagonal,
                cap=max_factor_dim,
                large=large_factors,
                kind=self.kind,
                add_variable=add_variable,
            )

        self.a = factor("a", block.n_a, block.a_is_diagonal)
        self.g = factor("g", block.n_out, False)
        cap = max_factor_dim or math.inf
        sizes = (("A", 0 if block.a_is_diagonal else block.n_a), ("G", block.n_out))
        self.capped = [label for label, n in sizes if n > cap]

    @property
    def averages(self) -> list[keras.Variable]:
        """The variables that `statistics` are averaged into, in the same order."""
        own = [] if self.moments is None else [self.moments]
        return [*self.a.averages, *self.g.averages, *own]

    @property
    def inverting(self) -> list[keras.Variable]:
        """The variables that invert the block, the order of `refreshed`."""
        own = [] if self.moments is None else [self.moments]
        return [*self.a.inverting, *self.g.inverting, *own]

    @property
    def bytes(self) -> int:
        """Memory of factors and what inverts them."""
        held = {id(v): v for v in (*self.averages, *self.inverting)}
        return 4 * sum(math.prod(v.shape) for v in held.values())

    def statistics(self, look: Look, **how: Any) -> list[Any]:
        """What one batch says about the block.

        Args:
            look: A pass that recorded the block's layer.
            **how: `reduce` and `sample` of `KroneckerBlock.factors`.

        Returns:
            One tensor per variable in `averages`.
        """
        a, g = self.block.factors(look.of(self.block.layer), **how)
        return [*self.a.parts_of(a), *self.g.parts_of(g)]

    def means(self, debias: Any) -> tuple[Any, Any]:
        """Mean eigenvalues of A and G, shapes `k`.

        Args:
            debias: Factor that makes the averages unbiased.
        """
        a, g = self.a.debiased(debias), self.g.debiased(debias)
        return self.a.mean_eigenvalue(a), self.g.mean_eigenvalue(g)

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

    def multiply(self, matrix: Any, debias: Any) -> Any:
        """`A V G`, the product of the averaged curvature with a matrix V.

        Args:
            matrix: V, shape `(*k, n_a, n_out)`.
            debias: Factor that makes the averages unbiased.
        """
        left = self.a.times(self.a.averages, matrix, -2)
        return self.g.times(self.g.averages, left, -1) * tf.square(debias)

    def precondition(self, matrix: Any, damping: Any) -> Any:
        """P of a gradient matrix V.

        Args:
            matrix: V, shape `(*k, n_a, n_out)`.
            damping: d, scalar.
        """
        raise NotImplementedError


class CholeskyPreconditioner(Preconditioner):
    """`P = (A + pi sqrt(d) I)^-1 V (G + sqrt(d)/pi I)^-1`, d as of the last refresh.

    References:
        Martens & Grosse 2015, section 6.3.
    """

    kind = "inverse"

    def precondition(self, matrix: Any, damping: Any) -> Any:
        return self.g.times(self.g.inverses, self.a.times(self.a.inverses, matrix, -2), -1)


class EigenPreconditioner(Preconditioner):
    """`P = Q_A [Q_A^T V Q_G / (s_A s_G^T + d)] Q_G^T`: damping that is not factored."""

    kind = "eigen"

    def precondition(self, matrix: Any, damping: Any) -> Any:
        a, g = self.a, self.g
        rotated = g.times(g.vectors, a.times(a.vectors, matrix, -2, transpose=True), -1)
        scaled = rotated / (self.curvature() + damping + _TINY)
        return g.times(g.vectors, a.times(a.vectors, scaled, -2), -1, transpose=True)

    def curvature(self) -> Any:
        """The block's diagonal in the eigenbasis, shape `(*k, n_a, n_out)`."""
        return _outer(self.a.values, self.g.values)


class EKFACPreconditioner(EigenPreconditioner):
    """`EigenPreconditioner` with `E (Q_A^T grad Q_G)^2` over single examples for `s_A s_G^T`.

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
            self.moments = add_variable(shape, "ones", dtype="float32", name=name)

    def statistics(self, look: Look, **how: Any) -> list[Any]:
        found = super().statistics(look, **how)
        if self.moments is not None:
            uses = look.of(self.block.layer)
            found.append(tf.add_n([self._moments(uses, probe) for probe in uses.probes]))
        return found

    def _moments(self, uses: Uses, gradients: Sequence[Any]) -> Any:
        """Second moments of the examples' own gradients in the eigenbasis."""
        rotated: Any = 0.0
        for record, g in zip(uses.records, gradients, strict=True):
            rows_a = tf.cast(self.block.homogeneous(self.block.rows_a(record)), "float32")
            rows_g = tf.cast(self.block.rows_g(record, g), "float32")
            rows_a = _by_example(self.a.times(self.a.vectors, rows_a, -1), uses.examples)
            rows_g = _by_example(self.g.times(self.g.vectors, rows_g, -1), uses.examples)
            rotated += tf.matmul(rows_a, rows_g, transpose_a=True)
        return tf.reduce_mean(tf.square(rotated), axis=-3)

    def curvature(self) -> Any:
        return super().curvature() if self.moments is None else tf.convert_to_tensor(self.moments)


def _by_example(rows: Any, examples: Any) -> Any:
    """`(*k, rows, T, n)` as `(*k, batch, T', n)`: a model may make several rows of an example."""
    *leading, made, locations, n = ops.shape(rows)
    batch = made if examples is None else examples
    of_example = made * locations // ops.maximum(batch, 1)  # a replica may have no examples
    return ops.reshape(rows, (*leading, batch, of_example, n))


def refreshed(states: Sequence[Preconditioner], debias: Any, damping: Any) -> list[Any]:
    """New values of everything that inverts some blocks, the order of their `inverting`.

    Args:
        states: The blocks; all invert in the same way.
        debias: Factor that makes the averages unbiased.
        damping: d, scalar.
    """
    factors = [factor for state in states for factor in (state.a, state.g)]
    by_parts = [factor.debiased(debias) for factor in factors]
    matrices = [
        part
        for factor, parts in zip(factors, by_parts, strict=True)
        for part in parts
        if not factor.is_diagonal
    ]
    if states and states[0].kind == "eigen":
        return _decompositions(states, factors, by_parts, matrices)
    dampings: list[Any] = []
    for state in states:
        dampings += factored_damping(*state.means(debias), damping)
    of_matrices = [
        d
        for factor, d in zip(factors, dampings, strict=True)
        for _ in (() if factor.is_diagonal else factor.sizes)
    ]
    inverses = iter(by_size(inverted, matrices, of_matrices))
    values = []
    for factor, parts, d in zip(factors, by_parts, dampings, strict=True):
        for part in parts:
            # Zero damping on a zero entry gives a zero inverse, as `damped_inverse` does.
            values += (
                [tf.math.divide_no_nan(1.0, part + d[..., None])]
                if factor.is_diagonal
                else next(inverses)
            )
    return values


def _decompositions(
    states: Sequence[Preconditioner],
    factors: Sequence[Factor],
    by_parts: Sequence[Sequence[Any]],
    matrices: Sequence[Any],
) -> list[Any]:
    decompositions = iter(by_size(decomposed, matrices))
    of_factor: list[tuple[list[Any], list[Any]]] = []
    for factor, parts in zip(factors, by_parts, strict=True):
        if factor.is_diagonal:
            of_factor.append(([tf.maximum(part, 0.0) for part in parts], []))
        else:
            pairs = [next(decompositions) for _ in parts]
            of_factor.append(([p[0] for p in pairs], [p[1] for p in pairs]))
    values: list[Any] = []
    for k, state in enumerate(states):
        (values_a, vectors_a), (values_g, vectors_g) = of_factor[2 * k : 2 * k + 2]
        values += [*values_a, *vectors_a, *values_g, *vectors_g]
        if state.moments is not None:
            # In a new basis the old moments mean nothing; K-FAC's own are the best guess.
            values.append(_outer(values_a, values_g))
    return values


def _outer(left: Sequence[Any], right: Sequence[Any]) -> Any:
    a, g = (tf.concat([tf.convert_to_tensor(v) for v in parts], axis=-1) for parts in (left, right))
    return a[..., :, None] * g[..., None, :]


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "cholesky": CholeskyPreconditioner,
    "eigen": EigenPreconditioner,
    "ekfac": EKFACPreconditioner,
}
