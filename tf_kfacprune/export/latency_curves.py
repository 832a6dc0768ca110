"""From times of a layer with fewer channels to curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tf_kfacprune.export.probes import FIXED, Channels
from tf_kfacprune.graph.curves import Curve
from tf_kfacprune.graph.latency import LayerTimes

__all__ = ["layer_times"]

_LEAST = 0.005  # microseconds: less than a clock shows
# Candidates for the constant of a product, in terms of the least time.
_CONSTANTS = np.linspace(-10.0, 0.99, 10991)
# A convolution from one channel to one is another kernel if it takes so much longer than the
# product of curves, and so much of the time of the whole layer.
_ANOTHER_KERNEL, _NOT_NOISE = 1.25, 0.02


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
        return LayerTimes(outputs=_curve({size: time for (_, size), time in times.items()}))
    single = times.pop((1, 1))
    inputs = _curve({n: time for (n, m), time in times.items() if m == created})
    outputs = _curve({m: time for (n, m), time in times.items() if n == read})
    constant = _constant(inputs, outputs, times)
    whole = times[read, created] - constant
    fitted = LayerTimes(
        constant,
        Curve(inputs.sizes, tuple(value - constant for value in inputs.values)),
        Curve(outputs.sizes, tuple((value - constant) / whole for value in outputs.values)),
    )
    more = single - fitted.at(1, 1)
    if single <= _ANOTHER_KERNEL * fitted.at(1, 1) or more < _NOT_NOISE * times[read, created]:
        return fitted
    return replace(fitted, one_to_one=more)


def _curve(times: Mapping[int, float]) -> Curve:
    sizes = sorted(times)
    return Curve(tuple(map(float, sizes)), tuple(times[size] for size in sizes))


def _constant(inputs: Curve, outputs: Curve, times: Mapping[Channels, float]) -> float:
    """The c for which c + (a - c) (b - c) / (t - c) is nearest to all times, in proportion.

    a and b are the times with fewer inputs only and with fewer outputs only, t is that with all.
    """
    candidates = min(*inputs.values, *outputs.values) * _CONSTANTS

    def products(a: float, b: float) -> np.ndarray:
        rest = (a - candidates) * (b - candidates) / (outputs.values[-1] - candidates)
        return np.maximum(candidates + rest, 0.1 * _LEAST)

    errors = sum(
        np.log(products(inputs.at(n), outputs.at(m)) / time) ** 2 for (n, m), time in times.items()
    )
    is_positive = products(min(inputs.values), min(outputs.values)) > 0.5 * _LEAST
    # Where the times do not tell, none.
    errors = np.where(is_positive, errors + 1e-9 * abs(_CONSTANTS), np.inf)
    return float(candidates[np.argmin(errors)])
