r"""A part of the locations (pixels, tokens) at which a layer applies its weights.

=======  =============================================================  =========
symbol   meaning                                                        shape
=======  =============================================================  =========
`T`      number of locations                                            scalar
`k`      number of them that are looked at, `ceil(fraction T)`          scalar
`r`      where they begin, uniform on 0 ... T - 1                       scalar
`t_j`    `(r + floor(j T / k)) mod T`, j = 0 ... k - 1                  (k,)
=======  =============================================================  =========

The locations stand in a circle and are evenly spaced on it. Whatever r, each location is met by k
of the T choices, so that `T/k sum_j f(t_j)` has the expectation `sum_t f(t)`: systematic sampling,
without bias. Evenly spaced pixels say more than as many drawn one by one, for neighbours agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from keras import ops

__all__ = ["LocationSample"]


@dataclass(frozen=True)
class LocationSample:
    """Which share of the locations is looked at, and where they begin.

    Attributes:
        fraction: Share of the locations, in (0, 1].
        noise: Uniform on [0, 1), a scalar; the same noise gives the same locations.
    """

    fraction: float
    noise: Any

    def positions(self, total: Any) -> Any:
        """The locations t_j, shape `(k,)`, int32.

        Args:
            total: T, an integer, or a scalar tensor where it is known at run time only.
        """
        wide = ops.cast(total, "float32")
        if isinstance(total, int):
            count: Any = math.ceil(self.fraction * total)
        else:
            count = ops.cast(ops.ceil(self.fraction * wide), "int32")
        start = ops.floor(ops.cast(self.noise, "float32") * wide)
        steps = ops.cast(ops.arange(count), "float32")
        spaced = ops.floor(steps * wide / ops.cast(count, "float32"))
        return ops.cast(ops.mod(start + spaced, wide), "int32")

    def of(self, rows: Any) -> Any:
        """The sampled ones of rows of shape `(*k, batch, T, n)`."""
        return ops.take(rows, self.positions(ops.shape(rows)[-2]), axis=-2)
