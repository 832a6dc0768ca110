"""From times of a layer with fewer channels to curves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tf_kfacprune.export.probes import FIXED, Channels
from tf_kfacprune.graph.curves import Curve
from tf_kfacprune.graph.latency import LayerTimes

__all__ = ["layer_times", "rising", "with_steps"]

_LEAST = 0.005  # microseconds: less than a clock shows
# Wider tiles are found as several of these that take as long.
_SMALL_TILE, _TILE = 8, 16
# Where twice as far above this size, a step is no more than a few per cent.
_LAST_STEP = 256
# Candidates for the constant of a product, in terms of the least time.
_CONSTANTS = np.linspace(-10.0, 0.99, 1100)
# A convolution from one channel to one is another kernel if it takes so much longer than the
# product of curves.
_ANOTHER_KERNEL = 1.25


def layer_times(times: Mapping[Channels, float]) -> LayerTimes:
    """The curves of a layer.

    Args:
        times: Microseconds by the channels that are read and created, as `LayerProbes` has them.
    """
    times = {channels: max(time, _LEAST) for channels, time in times.items()}
    read, created = (max(sizes) for sizes in zip(*times, strict=True))
    if (read, created) in (FIXED, (1, 1)):
        return LayerTimes(constant=times[read, created])
    if not read:
        return LayerTimes(outputs=with_steps({size: time for (_, size), time in times.items()}))
    single = times.pop((1, 1))
    inputs = with_steps({n: time for (n, m), time in times.items() if m == created})
    outputs = with_steps({m: time for (n, m), time in times.items() if n == read})
    constant = _constant(inputs, outputs, times)
    whole = outputs.values[-1] - constant
    fitted = LayerTimes(
        constant,
        Curve(inputs.sizes, tuple(value - constant for value in inputs.values)),
        Curve(outputs.sizes, tuple((value - constant) / whole for value in outputs.values)),
    )
    if single <= _ANOTHER_KERNEL * fitted.at(1, 1):
        return fitted
    return replace(fitted, one_to_one=single - fitted.at(1, 1))


def _constant(inputs: Curve, outputs: Curve, times: Mapping[Channels, float]) -> float:
    """The c for which c + (a - c) (b - c) / (t - c) is nearest to all times, in proportion.

    a and b are the times with fewer inputs only and with fewer outputs only, t is that with all.
    """
    candidates = min(inputs.values[0], outputs.values[0]) * _CONSTANTS

    def products(a: float, b: float) -> np.ndarray:
        rest = (a - candidates) * (b - candidates) / (outputs.values[-1] - candidates)
        return np.maximum(candidates + rest, 0.1 * _LEAST)

    errors = sum(
        np.log(products(inputs.at(n), outputs.at(m)) / time) ** 2 for (n, m), time in times.items()
    )
    is_positive = products(inputs.values[0], outputs.values[0]) > _LEAST
    # Where the times do not tell, none.
    return float(
        candidates[np.argmin(np.where(is_positive, errors + 1e-9 * abs(_CONSTANTS), np.inf))]
    )


def with_steps(times: Mapping[int, float]) -> Curve:
    """A curve through times that never falls, with steps where those of the kernel are.

    How much of a rise from one multiple of 8 to the next comes with the first channel is measured
    at small sizes; so are tiles of 8 told from larger ones. Both hold for all sizes.

    Args:
        times: Microseconds by size; a size n + 1 beside n = 8, 16 or 32 shows the step there.
    """
    sizes = np.array(sorted(times))
    values = rising(np.array([times[size] for size in sizes]))
    measured = dict(zip(sizes.tolist(), values.tolist(), strict=True))
    share, tile = _steps(measured)
    if share <= 1 / _SMALL_TILE:
        return _curve(measured)
    multiples = list(range(tile, min(int(sizes[-1]), _LAST_STEP), tile))
    known = dict(zip(multiples, np.interp(multiples, sizes, values).tolist(), strict=True))
    known.update(measured)
    ordered = sorted(known)
    for size, following in itertools.pairwise(ordered):
        if size % tile == 0 and size + 1 < following and size < _LAST_STEP:
            known[size + 1] = known[size] + share * (known[following] - known[size])
    return _curve(known)


def _curve(values: Mapping[int, float]) -> Curve:
    sizes = sorted(values)
    return Curve(tuple(map(float, sizes)), tuple(values[size] for size in sizes))


def _steps(times: Mapping[int, float]) -> tuple[float, int]:
    """The share of the rise between multiples that comes at once, and the size of tiles."""
    is_small = {8, 16, 24} <= set(times) and (
        times[16] - times[8] > 0.3 * (times[24] - times[16]) > 0.0
    )
    tile = _SMALL_TILE if is_small else _TILE
    at_once = rise = 0.0
    for size, following in ((8, 16), (16, 24), (32, 32 + tile)):
        if {size, size + 1, following} <= set(times):
            at_once += times[size + 1] - times[size]
            rise += times[following] - times[size]
    return at_once / rise if rise > 0.0 else 0.0, tile


def rising(values: np.ndarray) -> np.ndarray:
    """The nearest values, by least squares, that never fall."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            count = counts[-2] + counts.pop()
            last = means.pop()
            means[-1] += (last - means[-1]) * (count - counts[-1]) / count
            counts[-1] = count
    return np.repeat(means, counts)
