"""Blocks of Dense, EinsumDense and Embedding layers."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from tf_kfacprune.curvature.blocks.base import (
    KroneckerBlock,
    Record,
    for_rows,
    location_weights,
    spread_mask,
    total_weight,
)

__all__ = ["DenseBlock", "EinsumDenseBlock", "EmbeddingBlock"]


class DenseBlock(KroneckerBlock):
    """Dense on inputs of any rank; axes between batch and features are locations."""

    def __init__(self, layer: keras.layers.Dense) -> None:
        n_in, n_out = layer.kernel.shape
        bias = layer.bias if layer.use_bias else None
        super().__init__(layer, layer.kernel, bias, n_in=n_in, n_out=n_out)

    def rows_a(self, record: Record) -> Any:
        return ops.reshape(record.x, (ops.shape(record.x)[0], -1, self.n_in))

    def rows_g(self, record: Record, g: Any) -> Any:
        return ops.reshape(g, (ops.shape(g)[0], -1, self.n_out))


class EinsumDenseBlock(KroneckerBlock):
    """EinsumDense whose equation is a product of matrices, batched or not.

    Letters of the equation fall into four kinds: contracted (input and kernel) make up `n_in`,
    created (kernel and output) `n_out`, letters of all three are groups, and the rest, shared by
    input and output, are locations; the first of those is the batch.

    Args:
        layer: The layer.
        part: Name of the block within an attention layer.
    """

    def __init__(self, layer: keras.layers.EinsumDense, part: str = "") -> None:
        letters = self.letters(layer)
        if isinstance(letters, str):
            raise ValueError(letters)  # `blocks_of` asks first
        self._read, self._kernel, self._made = letters
        size = dict(zip(self._kernel, layer.kernel.shape, strict=True))
        self._groups = [k for k in self._kernel if k in self._read and k in self._made]
        self._contracted = [k for k in self._kernel if k not in self._made]
        self._created = [k for k in self._kernel if k not in self._read]
        self._size = size
        super().__init__(
            layer,
            layer.kernel,
            layer.bias,
            n_in=math.prod(size[k] for k in self._contracted),
            n_out=math.prod(size[k] for k in self._created),
            groups=math.prod(size[k] for k in self._groups) if self._groups else 0,
            part=part,
        )

    @staticmethod
    def letters(layer: keras.layers.EinsumDense) -> tuple[str, str, str] | str:
        """Input, kernel and output letters ('...' as '.'), or the reason why there is no block."""
        match = re.fullmatch(r"([\w.]+),(\w+)->([\w.]+)", layer.equation.replace("...", "."))
        if match is None:
            return f"equation {layer.equation!r} is not 'input,kernel->output'"
        read, kernel, made = match.groups()
        is_matrix_product = (
            all(len(set(part)) == len(part) for part in (read, kernel, made))
            and all(k in read or k in made for k in kernel)
            and set(read) <= set(kernel) | set(made)
            and set(made) <= set(kernel) | set(read)
            and read[0] == made[0]
            and read[0] not in kernel
        )
        if not is_matrix_product:
            return f"equation {layer.equation!r} is not a product of matrices"
        if layer.bias is not None:
            created = [k for k in made if k in kernel]
            shape = [s for s in layer.bias.shape if s != 1]
            size = dict(zip(kernel, layer.kernel.shape, strict=True))
            if shape != [size[k] for k in created if size[k] != 1]:
                return "the bias does not have one entry per output of the kernel"
            in_kernel_order = [k for k in kernel if k in made]
            if created != in_kernel_order:
                return "kernel and bias order their axes differently"
        return read, kernel, made

    def _rows(self, tensor: Any, letters: str, features: Sequence[str]) -> Any:
        """A tensor with the given letters as `(*groups, batch, T, n)`.

        Locations come in the order of the output, which may be another one than the input's.
        """
        made = self._made
        if "." in letters:
            rank = len(tensor.shape) - (len(letters) - 1)
            used = letters + self._kernel + made
            free = "".join([c for c in string.ascii_letters if c not in used][:rank])
            letters, made = letters.replace(".", free), made.replace(".", free)
        locations = [k for k in made if k not in self._kernel]
        order = [letters.index(k) for k in (*self._groups, *locations, *features)]
        tensor = ops.transpose(tensor, order)
        batch = ops.shape(tensor)[len(self._groups)]
        n = math.prod(self._size[k] for k in features)
        return ops.reshape(tensor, (*self.group_shape, batch, -1, n))

    def mask_of_locations(self, record: Record) -> Any:
        # A mask lies over the first axes; it counts where these are batch and locations.
        features = [*self._groups, *self._created]
        rank = len(record.s.shape)
        leading = next((k for k, c in enumerate(self._made) if c in features), rank)
        if "." in self._made[:leading]:
            leading = rank - len(self._created)
        if len(set(self._made[leading:]) - set(features)):
            return None
        return spread_mask(record.mask, record.s, leading)

    def rows_a(self, record: Record) -> Any:
        return self._rows(record.x, self._read, self._contracted)

    def rows_g(self, record: Record, g: Any) -> Any:
        return self._rows(g, self._made, self._created)

    def kernel_to_matrix(self, kernel: Any) -> Any:
        order = (*self._groups, *self._contracted, *self._created)
        kernel = ops.transpose(kernel, [self._kernel.index(k) for k in order])
        return super().kernel_to_matrix(kernel)

    def matrix_to_kernel(self, matrix: Any) -> Any:
        order = (*self._groups, *self._contracted, *self._created)
        kernel = ops.reshape(matrix, [self._size[k] for k in order])
        return ops.transpose(kernel, [order.index(k) for k in self._kernel])


class EmbeddingBlock(KroneckerBlock):
    """Embedding: the input is one-hot, so A is the diagonal of token frequencies."""

    a_is_diagonal = True
    is_contraction = False

    def __init__(self, layer: keras.layers.Embedding) -> None:
        n_in, n_out = layer.embeddings.shape
        super().__init__(layer, layer.embeddings, None, n_in=n_in, n_out=n_out)

    def factor_a(
        self,
        record: Record,
        g: Any,
        *,
        weights: Any = None,
        examples: Any = None,
        reduce: bool = False,
        sample: Any = None,
    ) -> Any:
        """Frequency of each token, shape `(n_in,)`.

        With K-FAC reduce, A of the mean over locations is not diagonal; its diagonal is kept.
        """
        del g, sample  # counting tokens costs nothing
        tokens = ops.cast(ops.reshape(record.x, (ops.shape(record.x)[0], -1)), "int32")
        mask = self.mask_of_locations(record)
        total = total_weight(weights, ops.shape(tokens)[0] if examples is None else examples)
        weights = for_rows(weights, ops.shape(tokens)[0])
        w = location_weights(mask, weights, ops.shape(tokens)[1])
        counted = ops.ones_like(tokens, dtype="float32") if w is None else w
        batch = ops.shape(tokens)[0]
        if not reduce:
            flat = ops.reshape(tokens, (-1,))
            return ops.segment_sum(ops.reshape(counted, (-1,)), flat, self.n_in) / total
        mask = ops.ones_like(counted) if mask is None else mask
        share = mask / ops.maximum(ops.sum(mask, axis=1, keepdims=True), 1.0)
        flat = ops.reshape(ops.arange(batch)[:, None] * self.n_in + tokens, (-1,))
        counts = ops.segment_sum(ops.reshape(share, (-1,)), flat, batch * self.n_in)
        squares = ops.square(ops.reshape(counts, (-1, self.n_in)))
        squares = squares if weights is None else squares * weights[:, None]
        return ops.sum(squares, axis=0) / total

    def rows_g(self, record: Record, g: Any) -> Any:
        return ops.reshape(g, (ops.shape(g)[0], -1, self.n_out))
