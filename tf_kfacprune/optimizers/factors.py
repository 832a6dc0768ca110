r"""One Kronecker factor as the optimizer keeps it: its average, and what inverts it.

=========  ================================================================  ===============
symbol     meaning                                                           shape
=========  ================================================================  ===============
`M`        factor A or G, exponential average                                (*k, n, n)
`Q, s`     its eigenvectors (columns) and eigenvalues, `M = Q diag(s) Q^T`   as M, (*k, n)
`V`        matrix to precondition; its rows belong to A, its columns to G    (*k, n_a, n_out)
=========  ================================================================  ===============

A factor that is diagonal by nature, or for its size, is held as the vector of its diagonal. Other
files put several of them together (`SplitFactor`), which is why averages, inverses and the like
come in lists: here, of one factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.linalg import damped_inverse

__all__ = ["AddVariable", "DiagonalizedFactor", "Factor", "InvertedFactor"]

AddVariable = Callable[..., keras.Variable]


class Factor:
    """The average of a factor.

    Args:
        name: Name of its variables.
        group_shape: Leading axes k.
        n: Dimension.
        is_diagonal: Whether only the diagonal is kept.
        add_variable: Creates a variable of the optimizer.

    Attributes:
        averages: The variables that hold M.
        variables: All variables.
        inverting: Those of them that invert the factor.
    """

    def __init__(
        self,
        name: str,
        group_shape: tuple[int, ...],
        n: int,
        is_diagonal: bool,
        add_variable: AddVariable,
    ) -> None:
        self.n = n
        self.is_diagonal = is_diagonal
        self.variables: list[keras.Variable] = []
        self.inverting: list[keras.Variable] = []
        self._name = name
        self._add_variable = add_variable
        self._vector, self._square = (*group_shape, n), (*group_shape, n, n)
        self._shape = self._vector if is_diagonal else self._square
        self.averages = [self._variable("factor", self._shape, "zeros")]

    def _variable(self, kind: str, shape: tuple[int, ...], initializer: Any) -> keras.Variable:
        name = f"{self._name}_{kind}"
        self.variables.append(self._add_variable(shape, initializer, dtype="float32", name=name))
        return self.variables[-1]

    def statistics(self, moment: Any) -> list[Any]:
        """A second moment in the form in which `averages` hold it."""
        if self.is_diagonal and len(moment.shape) > len(self._vector):
            return [tf.linalg.diag_part(moment)]
        return [moment]

    def debiased(self, debias: Any) -> list[Any]:
        """The averages times the number that makes them unbiased."""
        return [tf.convert_to_tensor(average) * debias for average in self.averages]

    def mean_eigenvalue(self, averages: Sequence[Any]) -> Any:
        """`tr M / n`, shape `k`.

        Args:
            averages: M, as from `debiased`.
        """
        (factor,) = averages
        if self.is_diagonal:
            return ops.mean(factor, axis=-1)
        return ops.trace(factor, axis1=-2, axis2=-1) / float(self.n)

    def mean_square_eigenvalue(self, averages: Sequence[Any]) -> Any:
        """`tr M^2 / n`, shape `k`; arguments as of `mean_eigenvalue`."""
        (factor,) = averages
        axes = -1 if self.is_diagonal else (-2, -1)
        return ops.sum(ops.square(factor), axis=axes) / float(self.n)


class InvertedFactor(Factor):
    """A factor and `(M + damping I)^-1`; arguments as for `Factor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        initializer = "ones" if self.is_diagonal else _identities
        self._inverse = self._variable("inverse", self._shape, initializer)
        self.inverting = [self._inverse]

    def inverted(self, averages: Sequence[Any], damping: Any) -> list[Any]:
        """The damped inverse, the value for `inverting`.

        Args:
            averages: M, as from `debiased`.
            damping: Shape `k`.
        """
        (factor,) = averages
        if self.is_diagonal:
            # Zero damping on a zero entry gives a zero inverse, as `damped_inverse` does.
            return [tf.math.divide_no_nan(1.0, factor + damping[..., None])]
        return [damped_inverse(factor, damping)]

    def solve_left(self, matrix: Any) -> Any:
        """`(M + damping I)^-1 V`."""
        inverse = tf.convert_to_tensor(self._inverse)
        return inverse[..., :, None] * matrix if self.is_diagonal else tf.matmul(inverse, matrix)

    def solve_right(self, matrix: Any) -> Any:
        """`V (M + damping I)^-1`."""
        inverse = tf.convert_to_tensor(self._inverse)
        return matrix * inverse[..., None, :] if self.is_diagonal else tf.matmul(matrix, inverse)


class DiagonalizedFactor(Factor):
    """A factor, its eigenvectors and eigenvalues; arguments as for `Factor`.

    The eigenvectors of a diagonal factor are the unit vectors and are not held.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._values = self._variable("eigenvalues", self._vector, "ones")
        if not self.is_diagonal:
            self._basis = self._variable("eigenvectors", self._square, _identities)
        self.inverting = self.variables[1:]

    @property
    def eigenvalues(self) -> Any:
        """s, shape `(*k, n)`."""
        return tf.convert_to_tensor(self._values)

    @staticmethod
    def eigenvalues_among(inverting: Sequence[Any]) -> Any:
        """Eigenvalues among values for `inverting`."""
        return inverting[0]

    def diagonalized(self, averages: Sequence[Any]) -> list[Any]:
        """Eigenvalues and eigenvectors of M, as from `debiased`: the values for `inverting`."""
        (factor,) = averages
        if self.is_diagonal:
            return [ops.maximum(factor, 0.0)]
        symmetric = 0.5 * (factor + ops.swapaxes(factor, -1, -2))
        values, vectors = tf.linalg.eigh(symmetric)
        return [ops.maximum(values, 0.0), vectors]

    def rotate_rows(self, rows: Any) -> Any:
        """`r^T Q` of rows `(*k, batch, T, n)`."""
        if self.is_diagonal:
            return rows
        basis = tf.convert_to_tensor(self._basis)
        return tf.matmul(rows, basis[..., None, :, :] if len(basis.shape) > 2 else basis)

    def rotate_left(self, matrix: Any, *, back: bool = False) -> Any:
        """`Q^T V`, or `Q V`."""
        if self.is_diagonal:
            return matrix
        return tf.matmul(tf.convert_to_tensor(self._basis), matrix, transpose_a=not back)

    def rotate_right(self, matrix: Any, *, back: bool = False) -> Any:
        """`V Q`, or `V Q^T`."""
        if self.is_diagonal:
            return matrix
        return tf.matmul(matrix, tf.convert_to_tensor(self._basis), transpose_b=back)


def _identities(shape: tuple[int, ...], dtype: Any = None) -> Any:
    return ops.broadcast_to(ops.eye(shape[-1], dtype=dtype), shape)
