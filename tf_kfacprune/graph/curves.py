"""Functions of a size that are straight between knots: how times of kernels depend on channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["Curve", "Curves"]


@dataclass(frozen=True)
class Curve:
    """A function of a size, straight between knots and constant outside of them.

    Args:
        sizes: Where the knots lie, rising.
        values: The value at each of them.

    Raises:
        InvalidArgumentError: If there is no knot, or sizes do not rise.

    Examples:
        >>> Curve((16, 17, 32), (1.0, 2.0, 2.0)).at(17)
        2.0
    """

    sizes: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or len(self.sizes) != len(self.values) or not rises:
            raise InvalidArgumentError(
                "A Curve needs rising sizes and a value for each. Received: "
                f"sizes={self.sizes}, values={self.values}"
            )

    def at(self, size: float) -> float:
        """The value at a size."""
        return float(np.interp(size, self.sizes, self.values))


class Curves:
    """Several curves, each evaluated at a size of its own.

    With knots k_0 < k_1 < ... and the slopes a_l between them,

        f(s) = f(k_0) + sum_l a_l clip(s - k_l, 0, k_{l+1} - k_l).

    Kernels work on tiles of channels, so that f is a staircase: its derivative is 0 almost
    everywhere, and where a tile begins a single channel seems to cost all of it. What a channel is
    worth to a layer that may lose many is what they save together. The derivative that `tensor`
    hands on is therefore the slope of the chord from half the size,

        f'(s) := (f(s) - f(s / 2)) / (s / 2).

    It is 0 only where even half of the channels take as long, and differs from the slope of a
    staircase at large by less than the share of one step. (The chord from 0 would promise savings
    in the first tile, where there are none.)

    Args:
        curves: The curves.
    """

    def __init__(self, curves: Sequence[Curve]) -> None:
        shape = (len(curves), max([1, *(len(curve.sizes) - 1 for curve in curves)]))
        self._first = np.array([curve.values[0] for curve in curves], float)
        self._knots, self._widths, self._slopes = (np.zeros(shape) for _ in range(3))
        for row, curve in enumerate(curves):
            count, widths = len(curve.sizes) - 1, np.diff(curve.sizes)
            self._knots[row, :count] = curve.sizes[:-1]
            self._widths[row, :count] = widths
            self._slopes[row, :count] = np.diff(curve.values) / widths

    def exact(self, sizes: np.ndarray) -> np.ndarray:
        """The values in NumPy, float64; one size per curve."""
        parts = np.clip(sizes[:, None] - self._knots, 0.0, self._widths)
        return self._first + (self._slopes * parts).sum(axis=1)

    def tensor(self, sizes: Any) -> Any:
        """The values, with chords for derivatives, in the element type of the sizes."""
        now = ops.stop_gradient(sizes)
        values, half = self._values(now), 0.5 * now
        # A size of 0 is that of a layer that is gone, and the chord has no length.
        chords = (values - self._values(half)) / ops.where(half > 0.0, half, 1.0)
        return values + chords * (sizes - now)

    def _values(self, sizes: Any) -> Any:
        first, knots, widths, slopes = (
            ops.cast(constant, sizes.dtype)
            for constant in (self._first, self._knots, self._widths, self._slopes)
        )
        parts = ops.minimum(ops.maximum(sizes[:, None] - knots, 0.0), widths)
        return first + ops.sum(slopes * parts, axis=1)
