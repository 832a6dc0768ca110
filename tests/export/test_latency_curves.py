"""From times to curves: steps, products, and kernels for one channel."""

from __future__ import annotations

import numpy as np
import pytest

from tf_kfacprune.export.latency_curves import layer_times, rising, with_steps
from tf_kfacprune.export.probes import FIXED


def tiles(size, count):
    return float(-(-count // size))


def grid(sizes, most):
    return [*(n for n in sizes if n < most), most]


MEASURED = (8, 9, 16, 17, 24, 32, 33, 48, 64, 96, 128)


def test_values_that_fall_are_replaced_by_their_mean():
    np.testing.assert_allclose(rising(np.array([1.0, 3.0, 2.0, 5.0])), [1.0, 2.5, 2.5, 5.0])
    np.testing.assert_allclose(rising(np.array([4.0, 3.0, 2.0, 9.0])), [3.0, 3.0, 3.0, 9.0])
    np.testing.assert_allclose(rising(np.array([1.0, 2.0])), [1.0, 2.0])


@pytest.mark.parametrize("tile", [8, 16])
def test_steps_are_found_between_sizes_that_were_not_measured(tile):
    curve = with_steps({n: 3.0 * tiles(tile, n) for n in grid(MEASURED, 200)})
    for n in range(8, 201):
        # Above 128 only the largest size was measured: what lies between is interpolated.
        ends = [128 / tile, tiles(tile, 200)]
        between = np.interp(min(tile * tiles(tile, n), 200), [128, 200], ends)
        expected = tiles(tile, n) if n <= 128 else between
        assert curve.at(n) / 3.0 == pytest.approx(expected, rel=1e-12), n


def test_a_straight_line_stays_one():
    curve = with_steps({n: 2.0 + 0.5 * n for n in grid(MEASURED, 200)})
    assert [curve.at(n) for n in (8, 20, 41, 57, 150)] == pytest.approx([6, 12, 22.5, 30.5, 77])


@pytest.mark.parametrize("constant", [0.0, 2.0, -0.8])
def test_a_product_of_curves_is_recovered_with_its_constant(constant):
    def time(n, m):
        return constant + (1.0 + 0.25 * n) * tiles(16, m)

    channels = [(64, m) for m in grid((2, *MEASURED[:-2]), 64)]
    channels += [(n, 64) for n in grid((1, 2, 4, 8, 9, 16, 17, 24, 32), 64)]
    times = {c: time(*c) for c in [*channels, (32, 32), (16, 16), (8, 8), (1, 1)]}
    fitted = layer_times(times)
    assert fitted.one_to_one == 0.0
    for n in (1, 3, 8, 33, 64):
        for m in (1, 16, 17, 40, 64):
            assert fitted.at(n, m) == pytest.approx(time(n, m), rel=0.02)


def test_one_channel_to_one_is_apart_if_its_kernel_is_another():
    times = {(1, m): 3.0 * tiles(16, m) for m in (20, 2, 8, 9, 16, 17)}
    assert layer_times({**times, (1, 1): 3.5}).one_to_one == 0.0
    fitted = layer_times({**times, (1, 1): 9.0})
    assert fitted.one_to_one == 6.0
    assert [fitted.at(1, m) for m in (1, 2, 16, 17, 20)] == [9.0, 3.0, 3.0, 6.0, 6.0]


def test_what_has_one_size_has_a_curve_of_it_and_what_has_none_a_constant():
    tied = layer_times({(0, 64): 8.0, (0, 1): 1.0, (0, 16): 2.0})
    assert [tied.at(1, m) for m in (1, 16, 40, 64)] == [1.0, 2.0, 5.0, 8.0]
    assert layer_times({FIXED: 5.0}).at(3, 4) == 5.0
    assert layer_times({(1, 1): 5.0}).at(1, 1) == 5.0
