"""Sizes that are known only at run time, while the call of a layer is being recorded.

Inside a compiled function `keras.ops.shape(x)` returns scalars for the sizes that are not known
beforehand; on symbolic tensors it returns None instead, and what is computed from a size is lost.
While a call is being recorded such a size is a symbolic scalar, and the operations that take sizes
are expressed by others that find them in the data: with the vector of zeros `z` along an axis of n
entries, cut out of `zeros_like(x)`,

    n = sum(z + 1),    arange(n) = cumsum(z + 1) - 1,    zeros((n, 4)) = z[:, None] + zeros((1, 4)),

    broadcast_to(x, shape) = x - zeros(shape),    x[:n] = take(x, arange(n)),

    reshape(x, (m, n, 4)) = take(reshape(x, (-1, 4)), n arange(m)[:, None] + arange(n)).

Zeros are subtracted, not added: Keras takes a summand with one axis longer than 1 for a bias, and
adds it along another axis where the sizes happen to agree.
So nothing but operations of Keras is left in the graph. Other uses of such a size fail, and the
layer stays closed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tf_kfacprune.errors import UnsupportedModelError

__all__ = ["symbolic_sizes"]


_REPLACED = (
    *("shape", "ndim", "arange", "reshape", "broadcast_to", "tile", "repeat"),
    *("zeros", "ones", "full", "slice"),
)


@contextmanager
def symbolic_sizes() -> Iterator[None]:
    """Makes sizes symbolic within a `with` block, for calls of `keras.ops` on symbolic tensors."""
    sizes = _Sizes()
    replaced: dict[str, Callable[..., Any]] = {name: getattr(ops, name) for name in _REPLACED}
    items = {kind: kind.__getitem__ for kind in (keras.KerasTensor, tf.Tensor)}
    for name, original in replaced.items():
        setattr(ops, name, _dispatch(getattr(sizes, name), original))
    for kind, item in items.items():
        kind.__getitem__ = _dispatch(sizes.item, item)
    try:
        yield
    finally:
        for name, original in replaced.items():
            setattr(ops, name, original)
        for kind, item in items.items():
            kind.__getitem__ = item


def _dispatch(symbolic: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that asks `symbolic` first, and `original` if that returns NotImplemented."""

    def function(*args: Any, **kwargs: Any) -> Any:
        result = symbolic(original, *args, **kwargs)
        return original(*args, **kwargs) if result is NotImplemented else result

    return function


class _Sizes:
    """The sizes met so far: symbolic scalars, with the axes they are the sizes of."""

    def __init__(self) -> None:
        self._axis_of: dict[int, tuple[Any, int]] = {}
        self._scalars: dict[tuple[int, int], Any] = {}
        self._zeros: dict[tuple[int, int], Any] = {}
        self._kept: list[Any] = []  # so that no `id` is used again

    # ---- operations, each preceded by the original one

    def shape(self, original: Any, x: Any) -> Any:
        if not _is_symbolic(x):
            return NotImplemented
        return tuple(self._size(x, k) if n is None else n for k, n in enumerate(x.shape))

    def ndim(self, original: Any, x: Any) -> Any:
        return len(x.shape) if _is_symbolic(x) else NotImplemented

    def arange(
        self, original: Any, start: Any, stop: Any = None, step: Any = None, dtype: Any = None
    ) -> Any:
        if not any(map(_is_symbolic, (start, stop, step))):
            return NotImplemented
        if stop is None:
            start, stop = 0, start
        if start != 0 or step not in (None, 1):
            raise _unsupported("arange", (start, stop, step))
        return ops.cast(ops.cumsum(self._along(stop) + 1) - 1, dtype or "int32")

    def reshape(self, original: Any, x: Any, newshape: Any) -> Any:
        if not isinstance(newshape, (tuple, list)):
            return NotImplemented
        if not any(n is None or _is_symbolic(n) for n in newshape):
            return NotImplemented
        if not _is_symbolic(x):
            x = ops.convert_to_tensor(x)
        target = self._with_known_size(x, list(newshape))
        free = [k for k, n in enumerate(target) if _is_symbolic(n) or n in (None, -1)]
        fixed = [-1 if k in free else int(n) for k, n in enumerate(target)]
        if len(free) == 1:
            return original(x, fixed)
        is_batch = free[0] == 0 and self._is_batch(target[0], x) and _is_symbolic(x)
        # Fewer unknown sizes than asked for: the first of them is split.
        if is_batch and sum(n is None for n in x.shape) >= len(free):
            run = free[1:]
        else:
            run, is_batch = free, False
        first, last = run[0], run[-1]
        if run != [*range(first, last + 1)] or not (is_batch or first == 0):
            raise _unsupported("reshape", newshape)
        merged = [*fixed[:first], -1, *fixed[last + 1 :]]
        if is_batch:
            dtype = x.dtype if "float" in x.dtype else None
            x = layers.Reshape(merged[1:], dtype=dtype)(x)
        else:
            x = original(x, merged)
        return x if len(run) == 1 else ops.take(x, self._numbered(target[first : last + 1]), first)

    def broadcast_to(self, original: Any, x: Any, shape: Any) -> Any:
        if not any(map(_is_symbolic, shape)):
            return NotImplemented
        own = [1] * (len(shape) - len(x.shape)) + list(x.shape)
        missing = [1 if n == size else size for n, size in zip(own, shape, strict=True)]
        zeros = self._zeros_of(missing, "int32" if _dtype(x) == "bool" else _dtype(x))
        return ops.logical_or(x, ops.cast(zeros, "bool")) if _dtype(x) == "bool" else x - zeros

    def tile(self, original: Any, x: Any, repeats: Any) -> Any:
        if not any(map(_is_symbolic, _as_tuple(repeats))):
            return NotImplemented
        own = [1] * (len(repeats) - len(x.shape)) + list(x.shape)
        fixed = [1 if _is_symbolic(n) else n for n in repeats]
        if any(_is_symbolic(n) and size != 1 for n, size in zip(repeats, own, strict=True)):
            raise _unsupported("tile", repeats)
        x = x if all(n == 1 for n in fixed) else original(x, fixed)
        pairs = zip(repeats, own, strict=True)
        shape = [n if _is_symbolic(n) else m if n == 1 else m * n for n, m in pairs]
        return self.broadcast_to(None, x, shape)

    def repeat(self, original: Any, x: Any, repeats: Any, axis: Any = None) -> Any:
        if not _is_symbolic(repeats):
            return NotImplemented
        if axis is None or x.shape[axis] != 1:
            raise _unsupported("repeat", repeats)
        shape: list[Any] = [1] * len(x.shape)
        shape[axis] = repeats
        return self.tile(None, x, shape)

    def zeros(self, original: Any, shape: Any, dtype: Any = None) -> Any:
        if not any(map(_is_symbolic, _as_tuple(shape))):
            return NotImplemented
        return self._zeros_of(_as_tuple(shape), dtype or keras.config.floatx())

    def ones(self, original: Any, shape: Any, dtype: Any = None) -> Any:
        zeros = self.zeros(None, shape, dtype)
        return zeros if zeros is NotImplemented else ops.ones_like(zeros)

    def full(self, original: Any, shape: Any, fill_value: Any, dtype: Any = None) -> Any:
        zeros = self.zeros(None, shape, dtype)
        return zeros if zeros is NotImplemented else zeros + fill_value

    def slice(self, original: Any, inputs: Any, start_indices: Any, shape: Any) -> Any:
        if not any(map(_is_symbolic, (*start_indices, *shape))):
            return NotImplemented
        for axis, (start, size) in enumerate(zip(start_indices, shape, strict=True)):
            if _is_symbolic(start) or _is_symbolic(size):
                inputs = self._take(inputs, axis, start, size)
            elif not (_is_zero(start) and size == inputs.shape[axis]):
                inputs = inputs[_key(axis, slice(start, start + size))]
        return inputs

    def item(self, original: Any, x: Any, key: Any) -> Any:
        keys = tuple(key) if isinstance(key, (tuple, list)) else (key,)
        if not any(isinstance(k, slice) and _is_symbolic(k.stop) for k in keys):
            is_wanted = isinstance(key, (int, tuple, list)) or not _is_symbolic(x)
            return NotImplemented if is_wanted else original(x, keys)  # Keras wants a tuple
        if Ellipsis in keys or not all(isinstance(k, slice) for k in keys):
            raise _unsupported("x[...]", key)
        for axis, k in enumerate(keys):
            if _is_symbolic(k.stop) and _is_zero(k.start or 0) and k.step in (None, 1):
                x = self._take(x, axis, 0, k.stop)
            elif k != slice(None):
                x = original(x, _key(axis, k))
        return x

    # ---- sizes in the data

    def _size(self, x: Any, axis: int) -> Any:
        """The number of entries of an axis, as a symbolic scalar."""
        known = (id(x), axis)
        if known not in self._scalars:
            self._kept.append(x)
            self._scalars[known] = scalar = ops.sum(self._zeros_along(x, axis) + 1)
            self._axis_of[id(scalar)] = (x, axis)
        return self._scalars[known]

    def _zeros_along(self, x: Any, axis: int) -> Any:
        known = (id(x), axis)
        if known not in self._zeros:
            self._kept.append(x)
            key = tuple(slice(None) if k == axis else 0 for k in range(len(x.shape)))
            self._zeros[known] = ops.zeros_like(x, dtype="int32")[key]
        return self._zeros[known]

    def _along(self, size: Any) -> Any:
        """Zeros, as many as a symbolic scalar says."""
        if id(size) not in self._axis_of:
            raise _unsupported("an operation that makes a tensor", size)
        return self._zeros_along(*self._axis_of[id(size)])

    def _is_batch(self, size: Any, x: Any) -> bool:
        """Whether a size is that of a batch axis, as the first axis of a tensor is."""
        is_first = size is None or self._axis_of.get(id(size), (None, None))[1] == 0
        return is_first and x.shape[0] is None

    def _with_known_size(self, x: Any, target: list[Any]) -> list[Any]:
        """A target shape with a number in place of -1, as far as can be told.

        What is computed from sizes cannot be: the last axis is taken to stay as it is, which
        shows afterwards if it is wrong.
        """
        asked = [k for k, n in enumerate(target) if not _is_symbolic(n) and n in (None, -1)]
        sizes = [n for n in target if _is_symbolic(n)]
        if len(asked) != 1 or not sizes:
            return target
        if all(id(n) in self._axis_of for n in sizes):
            entries = math.prod(n for n in x.shape if n is not None)
            others = math.prod(n for n in target if not _is_symbolic(n) and n not in (None, -1))
            if len(sizes) == sum(n is None for n in x.shape) and others and entries % others == 0:
                target[asked[0]] = entries // others
        elif asked[0] == len(target) - 1:
            target[-1] = x.shape[-1]
        return target

    def _numbered(self, shape: Sequence[Any]) -> Any:
        """The numbers 0, 1, ... in an array of a shape, row by row."""
        numbers: Any = 0
        for axis, size in enumerate(shape):
            place = ops.cumsum(self._along(size) + 1) - 1
            others = [k for k in range(len(shape)) if k != axis]
            numbers = numbers * size + ops.expand_dims(place, others)
        return numbers

    def _zeros_of(self, shape: Sequence[Any], dtype: Any) -> Any:
        fixed = [1 if _is_symbolic(n) else n for n in shape]
        total: Any = np.zeros(fixed, "int32")
        for axis, size in enumerate(shape):
            if _is_symbolic(size):
                others = [k for k in range(len(shape)) if k != axis]
                total = ops.expand_dims(self._along(size), others) - total
        return ops.cast(total, dtype)

    def _take(self, x: Any, axis: int, start: Any, size: Any) -> Any:
        if not _is_symbolic(size):
            raise _unsupported("slice", (start, size))
        positions = ops.cumsum(self._along(size) + 1) - 1
        return ops.take(x, positions if _is_zero(start) else positions + start, axis=axis)


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor)


def _is_zero(start: Any) -> bool:
    return isinstance(start, int) and start == 0


def _as_tuple(shape: Any) -> tuple[Any, ...]:
    return tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)


def _dtype(x: Any) -> str:
    return keras.backend.standardize_dtype(x.dtype)


def _key(axis: int, key: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * axis, key)


def _unsupported(operation: str, size: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{operation} with a size that is known only at run time: {size!r}"
    )
