"""From times to curves: products, and kernels for one channel."""

from __future__ import annotations

import pytest

from tf_kfacprune.export.latency_curves import layer_times
from tf_kfacprune.export.probes import FIXED, _around_edges, _below


def tiles(count):
    return float(-(-count // 16))


def times_of(time, read, created):
    """What `LayerProbes.channels` asks for."""
    channels = [(read, m) for m in (created, *_around_edges(created))]
    channels += [(n, created) for n in _below(read, (1, 2, 4, 8, 16, 32))]
    return {c: time(*c) for c in [*channels, (32, 32), (16, 16), (8, 8), (1, 1)]}


def test_sizes_lie_around_edges_of_tiles_and_beside_the_largest():
    assert _around_edges(20) == [2, 7, 8, 9, 15, 16, 17, 19]
    assert _around_edges(16) == [2, 7, 8, 9, 15]
    assert _around_edges(2) == _around_edges(1) == []
    assert _around_edges(300)[-7:] == [191, 192, 193, 255, 256, 257, 299]
    assert _below(300, (1, 16, 64)) == [1, 16, 64, 96, 128, 192, 256]


@pytest.mark.parametrize("constant", [0.0, 2.0, -0.8])
def test_a_product_of_curves_is_recovered_with_its_constant(constant):
    def time(n, m):
        return constant + (1.0 + 0.25 * n) * tiles(m)

    fitted = layer_times(times_of(time, 64, 128))
    assert fitted.one_to_one == 0.0
    assert fitted.at(64, 128) == pytest.approx(time(64, 128), rel=1e-12)
    for n in (1, 3, 8, 33, 64):
        for m in (1, 16, 17, 40, 64, 65, 77, 113):
            assert fitted.at(n, m) == pytest.approx(time(n, m), rel=0.02)


def test_sizes_that_are_faster_because_they_are_aligned_stay_so():
    fitted = layer_times(times_of(lambda n, m: n * m * (1.0 if m % 16 == 0 else 1.5), 64, 96))
    for m, factor in ((15, 1.5), (16, 1.0), (17, 1.5), (71, 1.5), (80, 1.0), (96, 1.0)):
        assert fitted.at(10, m) == pytest.approx(10 * m * factor, rel=0.01)


def test_one_channel_to_one_is_apart_if_its_kernel_is_another():
    times = {(1, m): 3.0 * tiles(m) for m in (20, *_around_edges(20))}
    assert layer_times({**times, (1, 1): 3.5}).one_to_one == 0.0
    fitted = layer_times({**times, (1, 1): 9.0})
    assert fitted.one_to_one == pytest.approx(6.0)
    expected = [9.0, 3.0, 3.0, 6.0, 6.0]
    assert [fitted.at(1, m) for m in (1, 2, 16, 17, 20)] == pytest.approx(expected)


def test_what_has_one_size_has_a_curve_of_it_and_what_has_none_a_constant():
    tied = layer_times({(0, 64): 8.0, (0, 1): 1.0, (0, 16): 2.0})
    assert [tied.at(1, m) for m in (1, 16, 40, 64)] == [1.0, 2.0, 5.0, 8.0]
    assert layer_times({FIXED: 5.0}).at(3, 4) == 5.0
    assert layer_times({(1, 1): 5.0}).at(1, 1) == 5.0
