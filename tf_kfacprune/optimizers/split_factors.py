r"""A factor of many rows, cut into diagonal blocks of nearly equal size.

=========  ================================================================  ===============
symbol     meaning                                                           shape
=========  ================================================================  ===============
`M`        factor A or G                                                     (*k, n, n)
`M_j`      j-th diagonal block of it; the rest is taken for zero             (*k, n_j, n_j)
=========  ================================================================  ===============

Inverse, eigenvectors and products of a block-diagonal matrix are those of its blocks. Memory and
products cost `sum n_j^2` instead of `n^2`, inverses `sum n_j^3` instead of `n^3`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.optimizers.factors import AddVariable, DiagonalizedFactor, Factor, InvertedFactor

__all__ = ["SplitDiagonalizedFactor", "SplitFactor", "SplitInvertedFactor"]


class SplitFactor:
    """Blocks of a factor; offers what `Factor` does.

    Args:
        name: Name of its variables.
        group_shape: Leading axes k.
        n: Dimension.
        cap: Largest dimension of a block.
        add_variable: Creates a variable of the optimizer.

    Attributes:
        sizes: n_j of each block.
    """

    part_class: type[Factor]
    is_diagonal = False

    def __init__(
        self, name: str, group_shape: tuple[int, ...], n: int, cap: int, add_variable: AddVariable
    ) -> None:
        self.n = n
        count = math.ceil(n / cap)
        self.sizes = [n // count + (j < n % count) for j in range(count)]
        self.parts: list[Any] = [
            self.part_class(f"{name}_{j}", group_shape, size, False, add_variable)
            for j, size in enumerate(self.sizes)
        ]

    def _gathered(self, what: Callable[[Any], Sequence[Any]]) -> list[Any]:
        return [each for part in self.parts for each in what(part)]

    @property
    def averages(self) -> list[keras.Variable]:
        """The variables that hold the blocks."""
        return self._gathered(lambda part: part.averages)

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables."""
        return self._gathered(lambda part: part.variables)

    @property
    def inverting(self) -> list[keras.Variable]:
        """Those of them that invert the factor."""
        return self._gathered(lambda part: part.inverting)

    def statistics(self, moment: Any) -> list[Any]:
        """The diagonal blocks of a second moment."""
        rows = tf.split(moment, self.sizes, axis=-2)
        return [tf.split(row, self.sizes, axis=-1)[j] for j, row in enumerate(rows)]

    def debiased(self, debias: Any) -> list[Any]:
        """The averages times the number that makes them unbiased."""
        return self._gathered(lambda part: part.debiased(debias))

    def mean_eigenvalue(self, averages: Sequence[Any]) -> Any:
        """`tr M / n`, shape `k`."""
        pairs = zip(self.parts, averages, strict=True)
        return tf.add_n([part.mean_eigenvalue([m]) * (part.n / self.n) for part, m in pairs])

    def mean_square_eigenvalue(self, averages: Sequence[Any]) -> Any:
        """`tr M^2 / n`, shape `k`."""
        pairs = zip(self.parts, averages, strict=True)
        return tf.add_n([part.mean_square_eigenvalue([m]) * (part.n / self.n) for part, m in pairs])

    def _each(self, tensor: Any, axis: int, apply: Callable[[Any, Any], Any]) -> Any:
        """Cuts a tensor along an axis, hands every block its piece, puts the results together."""
        pieces = tf.split(tensor, self.sizes, axis=axis)
        pairs = zip(self.parts, pieces, strict=True)
        return tf.concat([apply(part, piece) for part, piece in pairs], axis=axis)


class SplitInvertedFactor(SplitFactor):
    """Blocks of an `InvertedFactor`; arguments as for `SplitFactor`."""

    part_class = InvertedFactor

    def inverted(self, averages: Sequence[Any], damping: Any) -> list[Any]:
        """The damped inverses, the values for `inverting`."""
        pairs = zip(self.parts, averages, strict=True)
        return [inverse for part, m in pairs for inverse in part.inverted([m], damping)]

    def solve_left(self, matrix: Any) -> Any:
        """`(M + damping I)^-1 V`."""
        return self._each(matrix, -2, lambda part, rows: part.solve_left(rows))

    def solve_right(self, matrix: Any) -> Any:
        """`V (M + damping I)^-1`."""
        return self._each(matrix, -1, lambda part, columns: part.solve_right(columns))


class SplitDiagonalizedFactor(SplitFactor):
    """Blocks of a `DiagonalizedFactor`; arguments as for `SplitFactor`."""

    part_class = DiagonalizedFactor

    @property
    def eigenvalues(self) -> Any:
        """s, shape `(*k, n)`."""
        return tf.concat([part.eigenvalues for part in self.parts], axis=-1)

    @staticmethod
    def eigenvalues_among(inverting: Sequence[Any]) -> Any:
        """Eigenvalues among values for `inverting`, where eigenvectors follow each of them."""
        return tf.concat(list(inverting[::2]), axis=-1)

    def diagonalized(self, averages: Sequence[Any]) -> list[Any]:
        """Eigenvalues and eigenvectors of the blocks, the values for `inverting`."""
        pairs = zip(self.parts, averages, strict=True)
        return [value for part, m in pairs for value in part.diagonalized([m])]

    def rotate_rows(self, rows: Any) -> Any:
        """`r^T Q` of rows `(*k, batch, T, n)`."""
        return self._each(rows, -1, lambda part, piece: part.rotate_rows(piece))

    def rotate_left(self, matrix: Any, *, back: bool = False) -> Any:
        """`Q^T V`, or `Q V`."""
        return self._each(matrix, -2, lambda part, rows: part.rotate_left(rows, back=back))

    def rotate_right(self, matrix: Any, *, back: bool = False) -> Any:
        """`V Q`, or `V Q^T`."""
        return self._each(matrix, -1, lambda part, columns: part.rotate_right(columns, back=back))
