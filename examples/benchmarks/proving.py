"""What the proofs over many models have in common: statistics, times, gated against compact."""

import time

import numpy as np

from tf_kfacprune.compaction import compact, parity_error


def timed(function, *args, **kwargs):
    """The result of a call and its wall time in seconds."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, round(time.perf_counter() - start, 3)


def disturb_statistics(norms, model, x, rng, least=0.0):
    """Moving statistics of a batch, then changed at random, variances by `least` at least.

    Made up from nothing, they blow up rounding errors from layer to layer until no two
    computations agree.
    """
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    if norms:
        model(x, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        spread = np.sqrt(layer.moving_variance.numpy())
        shift = rng.uniform(-0.2, 0.2, spread.shape) * spread
        layer.moving_mean.assign(layer.moving_mean.numpy() + shift)
        factor = rng.uniform(0.7, 1.4, spread.shape)
        layer.moving_variance.assign(layer.moving_variance.numpy() * factor + least)


def compared(gated, dense, x, params):
    """The compact model, the seconds it took, and a record of how it differs from the gated one.

    Next to the error stands the effect of closing the gates at all, to judge it by.
    """
    small, seconds = timed(compact, gated, verify=False)
    expected = gated(x, training=False)
    record = {
        "error": parity_error(expected, small(x, training=False)),
        "effect": parity_error(dense, expected),
        "params": small.count_params() / params,
    }
    return small, seconds, record
