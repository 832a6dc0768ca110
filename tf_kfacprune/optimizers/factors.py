r"""One Kronecker factor as the optimizer keeps it: its average, and what inverts it.

=========  ================================================================  ================
symbol     meaning                                                           shape
=========  ================================================================  ================
`M`        factor A or G, exponential average                                (*k, n, n)
`M_j`      its j-th diagonal part; what lies outside of the parts is zero    (*k, n_j, n_j)
`Q_j, s_j` eigenvectors (columns) and eigenvalues of M_j                     as M_j, (*k, n_j)
=========  ================================================================  ================

A factor is a list of parts: one for a factor that is kept as a whole, several for one that is split
for its size, vectors in place of matrices for one that is diagonal, by nature or for its size.
Inverses, eigenvectors and products of a matrix of diagonal parts are those of its parts. Memory and
products cost `sum n_j^2` instead of `n^2`, inverses `sum n_j^3` instead of `n^3`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tf_kfacprune.linalg import damped_inverse

__all__ = ["AddVariable", "Factor", "by_size", "decomposed", "inverted"]

AddVariable = Callable[..., keras.Variable]


class Factor:
    """A factor and its variables.

    Attributes:
        n: Dimension.
        sizes: n_j of each part.
        is_diagonal: Whether parts are vectors, of the diagonal.
        averages: Variables that hold the parts M_j.
        inverses: Variables that hold `(M_j + damping I)^-1`; empty for kind `"eigen"`.
        vectors: Variables that hold Q_j; empty for kind `"inverse"`, and where M is diagonal.
        values: Variables that hold s_j; empty for kind `"inverse"`.

    Args:
        name: Name of its variables.
        group_shape: Leading axes k.
        sizes: As the attribute.
        is_diagonal: As the attribute.
        kind: What inverts it: `"inverse"` or `"eigen"`.
        add_variable: Creates a variable of the optimizer.
    """

    def __init__(
        self,
        name: str,
        group_shape: tuple[int, ...],
        sizes: Sequence[int],
        is_diagonal: bool,
        kind: str,
        add_variable: AddVariable,
    ) -> None:
        self.sizes = list(sizes)
        self.n = sum(sizes)
        self.is_diagonal = is_diagonal

        def per_part(what: str, initializer: Any, vector: bool = is_diagonal) -> Any:
            found = []
            for j, size in enumerate(self.sizes):
                part = f"{name}_{j}_{what}" if len(self.sizes) > 1 else f"{name}_{what}"
                shape = (*group_shape, size) if vector else (*group_shape, size, size)
                found.append(add_variable(shape, initializer, dtype="float32", name=part))
            return found

        one = "ones" if is_diagonal else _identities
        self.averages: list[keras.Variable] = per_part("factor", "zeros")
        self.inverses: list[keras.Variable] = []
        self.vectors: list[keras.Variable] = []
        self.values: list[keras.Variable] = []
        if kind == "inverse":
            self.inverses = per_part("inverse", one)
        else:
            self.values = per_part("eigenvalues", "ones", vector=True)
            self.vectors = [] if is_diagonal else per_part("eigenvectors", _identities)

    @classmethod
    def of(
        cls,
        name: str,
        group_shape: tuple[int, ...],
        n: int,
        *,
        is_diagonal: bool,
        cap: int | None,
        large: str,
        kind: str,
        add_variable: AddVariable,
    ) -> Factor:
        """A factor of a dimension, cut down to a cap.

        Args:
            name: Name of its variables.
            group_shape: Leading axes k.
            n: Dimension.
            is_diagonal: Whether it is diagonal by nature.
            cap: Dimension above which it is not kept as a whole, or None.
            large: What is kept then: its `"diagonal"`, or parts of nearly equal size (`"split"`).
            kind: What inverts it: `"inverse"` or `"eigen"`.
            add_variable: Creates a variable of the optimizer.
        """
        is_large = cap is not None and n > cap
        count = 1
        if cap is not None and is_large and not is_diagonal and large == "split":
            count = math.ceil(n / cap)
        sizes = [n // count + (j < n % count) for j in range(count)]
        diagonal = is_diagonal or (is_large and count == 1)
        return cls(name, group_shape, sizes, diagonal, kind, add_variable)

    @property
    def inverting(self) -> list[keras.Variable]:
        """The variables that invert the factor."""
        return [*self.inverses, *self.values, *self.vectors]

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables."""
        return [*self.averages, *self.inverting]

    def parts_of(self, moment: Any) -> list[Any]:
        """A second moment, `(*k, n, n)` or its diagonal, in the form that `averages` have."""
        rank = len(self.averages[0].shape) - 1  # of the last axis, for vectors
        if self.is_diagonal:
            return [tf.linalg.diag_part(moment) if len(moment.shape) - 1 > rank else moment]
        if len(self.sizes) == 1:
            return [moment]
        rows = tf.split(moment, self.sizes, axis=-2)
        return [tf.split(row, self.sizes, axis=-1)[j] for j, row in enumerate(rows)]

    def debiased(self, debias: Any) -> list[Any]:
        """The averages times the number that makes them unbiased."""
        return [tf.convert_to_tensor(average) * debias for average in self.averages]

    def times(
        self, parts: Sequence[Any], tensor: Any, axis: int, *, transpose: bool = False
    ) -> Any:
        """A matrix of diagonal parts times V (axis -2), or V times it (axis -1).

        Args:
            parts: `averages`, `inverses` or `vectors`, or tensors like them; none at all stand for
                the identity.
            tensor: V, shape `(*k, ..., n_a, n_out)`.
            axis: The axis of V that is multiplied, -2 or -1.
            transpose: Whether the matrix is transposed first.
        """
        if not parts:
            return tensor
        whole = len(parts) == 1
        pieces = [tensor] if whole else tf.split(tensor, self.sizes, axis=axis)
        products = []
        for variable, piece in zip(parts, pieces, strict=True):
            part = tf.convert_to_tensor(variable)
            if self.is_diagonal:
                part = part[..., :, None] if axis == -2 else part[..., None, :]
            if len(part.shape) > 2:  # leading axes k of both stand first
                between = [1] * (len(piece.shape) - len(part.shape))
                part = tf.reshape(part, (*part.shape[:-2], *between, *part.shape[-2:]))
            if self.is_diagonal:
                products.append(piece * part)
            elif axis == -2:
                products.append(tf.matmul(part, piece, transpose_a=transpose))
            else:
                products.append(tf.matmul(piece, part, transpose_b=transpose))
        return products[0] if whole else tf.concat(products, axis=axis)

    def mean_eigenvalue(self, parts: Sequence[Any]) -> Any:
        """`tr M / n`, shape `k`.

        Args:
            parts: M, as from `debiased`.
        """
        diagonals = parts if self.is_diagonal else [tf.linalg.diag_part(part) for part in parts]
        return tf.add_n([ops.sum(d, axis=-1) for d in diagonals]) / float(self.n)

    def mean_square_eigenvalue(self, parts: Sequence[Any]) -> Any:
        """`tr M^2 / n`, shape `k`; arguments as of `mean_eigenvalue`."""
        axes = -1 if self.is_diagonal else (-2, -1)
        return tf.add_n([ops.sum(ops.square(part), axis=axes) for part in parts]) / float(self.n)


def by_size(
    apply: Callable[..., Sequence[Any]], matrices: Sequence[Any], *scalars: Sequence[Any]
) -> list[list[Any]]:
    """Applies a function of stacked matrices to matrices of many sizes, once for every size.

    Every call of an inverse or of a decomposition is a subgraph of its own, which takes time to
    trace; a network has many factors of few sizes.

    Args:
        apply: From matrices `(m, n, n)` and further arguments `(m,)` to tensors `(m, ...)`.
        matrices: Tensors of shape `(*k, n, n)`.
        *scalars: For each further argument one tensor of shape `k` per matrix.

    Returns:
        What `apply` returns of each matrix, with its own leading axes.
    """
    found: list[list[Any]] = [[] for _ in matrices]
    order = sorted(range(len(matrices)), key=lambda j: matrices[j].shape[-1])
    for n, members in itertools.groupby(order, key=lambda j: matrices[j].shape[-1]):
        places = list(members)
        leading = [tuple(matrices[j].shape[:-2]) for j in places]
        counts = [math.prod(shape) for shape in leading]
        stacked = tf.concat([tf.reshape(matrices[j], (-1, n, n)) for j in places], axis=0)
        further = [
            tf.concat([tf.broadcast_to(tf.reshape(of[j], (-1,)), (c,)) for j, c in pairs], axis=0)
            for of in scalars
            for pairs in [list(zip(places, counts, strict=True))]
        ]
        for result in apply(stacked, *further):
            pieces = tf.split(result, counts, axis=0)
            for j, shape, piece in zip(places, leading, pieces, strict=True):
                found[j].append(tf.reshape(piece, (*shape, *result.shape[1:])))
    return found


def inverted(matrices: Any, damping: Any) -> list[Any]:
    """`(M + damping I)^-1` of stacked matrices, for `by_size`."""
    return [damped_inverse(matrices, damping)]


def decomposed(matrices: Any) -> list[Any]:
    """Eigenvalues, none below zero, and eigenvectors of stacked matrices, for `by_size`."""
    symmetric = 0.5 * (matrices + tf.linalg.matrix_transpose(matrices))
    values, vectors = tf.linalg.eigh(symmetric)
    return [tf.maximum(values, 0.0), vectors]


def _identities(shape: tuple[int, ...], dtype: Any = None) -> Any:
    return ops.broadcast_to(ops.eye(shape[-1], dtype=dtype), shape)
