"""Budgets, phases and the landing on a budget."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_kfacprune.errors import BudgetError, InvalidArgumentError
from tf_kfacprune.pruning import Budget, OpenCounts, Phases, land_on_budget, target_fraction


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, 15, "small", float("nan")])
def test_a_bound_outside_the_unit_interval_is_refused(value):
    with pytest.raises(BudgetError, match="macs="):
        Budget(macs=value)


def test_a_budget_needs_a_bound():
    with pytest.raises(BudgetError, match="at least one bound"):
        Budget()


@pytest.mark.parametrize("thing", [Budget(macs=0.1, params=0.5), Phases(0.2, 0.3, decay=False)])
def test_settings_round_trip_through_keras_serialization(thing):
    config = keras.saving.serialize_keras_object(thing)
    assert keras.saving.deserialize_keras_object(config) == thing


@pytest.mark.parametrize("shares", [(1.0, 0.5), (0.5, 0.5), (-0.1, 0.5), (0.1, 0.0)])
def test_phases_leave_steps_to_settle(shares):
    with pytest.raises(InvalidArgumentError, match="settle"):
        Phases(*shares)


def test_even_one_step_runs_have_a_pruning_phase():
    start, end = Phases(0.1, 0.5).boundaries(1)
    assert start < end


def test_the_target_falls_from_one_to_the_budget_and_stays():
    path = [float(target_fraction(0.1, p)) for p in np.linspace(0, 1, 11).astype("float32")]
    assert path[0] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(path))
    np.testing.assert_allclose(path[7:], 0.1, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    target=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_landing_is_the_largest_network_within_the_budget(sizes, target, seed):
    n = sum(sizes)
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n).astype("float32")
    weights = rng.uniform(0.1, 1.0, size=n).astype("float32")
    counts = [OpenCounts(size) for size in sizes]
    keep = land(scores, counts, weights, target)
    groups = np.split(keep, np.cumsum(sizes)[:-1])
    assert all(group.any() for group in groups)
    cost = weights[keep].sum() / weights.sum()
    best_of_groups = [
        s + np.argmax(scores[s : s + k]) for s, k in zip(_starts(sizes), sizes, strict=True)
    ]
    assert keep[best_of_groups].all()
    removable = [i for i in range(n) if keep[i] and i not in best_of_groups]
    assert cost <= target + 1e-5 or not removable
    for start, size in zip(_starts(sizes), sizes, strict=True):
        closed = start + np.flatnonzero(~keep[start : start + size])
        if len(closed):
            reopened = closed[np.argmax(scores[closed])]
            assert cost + weights[reopened] / weights.sum() > target - 1e-5


COUNTS = st.builds(
    lambda least, steps, step, rest: OpenCounts(least + steps * step + rest % step, least, step),
    least=st.integers(0, 4),
    steps=st.integers(0, 3),
    step=st.integers(1, 4),
    rest=st.integers(0, 3),
).filter(lambda counts: counts.size > 0)


@settings(max_examples=12, deadline=None)
@given(counts=st.lists(COUNTS, min_size=1, max_size=4), fill=st.booleans(), seed=st.integers(0, 99))
def test_landing_keeps_the_best_in_allowed_numbers(counts, fill, seed):
    sizes = [group.size for group in counts]
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=sum(sizes)).astype("float32")
    weights = rng.uniform(0.1, 1.0, size=sum(sizes)).astype("float32")
    least, before = land(scores, counts, weights, 1e-9), None
    for target in (0.7, 0.3, 1e-9):
        keep = land(scores, counts, weights, target, fill=fill)
        assert (keep >= least).all()
        if before is not None and not fill:
            assert (keep <= before).all()
        before = keep
        assert weights[keep].sum() / weights.sum() <= target + 1e-5 or (keep == least).all()
        for group, start in zip(counts, _starts(sizes), strict=True):
            kept = keep[start : start + group.size]
            assert group.least <= kept.sum() <= group.most
            assert (kept.sum() - group.least) % group.step == 0
            own = scores[start : start + group.size]
            if kept.any() and not kept.all():
                assert own[kept].min() > own[~kept].max()
    assert [int(part.sum()) for part in np.split(least, np.cumsum(sizes)[:-1])] == [
        group.least for group in counts
    ]


def test_blocks_close_in_the_order_of_their_mean_rank():
    counts = [OpenCounts(4, least=0, step=2), OpenCounts(2, least=1)]
    scores = np.array([5.0, 4.0, 1.0, 0.0, 3.0, 2.0], "float32")
    keep = land(scores, counts, np.ones(6, "float32"), 4 / 6)
    assert keep.tolist() == [True, True, False, False, True, True]


def test_gates_of_a_group_need_not_be_neighbours():
    keep = land_on_budget(
        np.array([1.0, 5.0, 2.0, 4.0], "float32"),
        np.array([0, 1, 0, 1]),
        [OpenCounts(2), OpenCounts(2)],
        lambda measure, keep: keras.ops.mean(keep),
        {"macs": 0.5},
    )
    assert np.array(keep).tolist() == [0, 1, 1, 0]


def test_what_still_fits_behind_a_coarse_block_is_opened():
    # The second-best gate costs 60: without filling, the 19 fine ones behind it stay closed, too.
    scores = np.arange(22, 0, -1).astype("float32")
    weights = np.array([60.0, 60.0] + [1.0] * 20, "float32")
    counts = [OpenCounts(2), OpenCounts(20)]
    assert land(scores, counts, weights, 80 / 140, fill=False).sum() == 2
    keep = land(scores, counts, weights, 80 / 140)
    assert keep.tolist() == [True, False] + [True] * 20


def test_a_coarse_block_is_exchanged_for_finer_ones_where_the_budget_is_far():
    # 30 + 30 leave 40 of 100 unused, for which the next block of 45 is too large.
    counts = [OpenCounts(2, least=0), OpenCounts(2, least=0)]
    scores = np.array([4.0, 3.0, 2.0, 1.0], "float32")
    weights = np.array([30.0, 30.0, 45.0, 60.0], "float32")
    keep = land(scores, counts, weights, 100 / 165)
    assert keep.tolist() == [True, False, True, False]


def test_finer_blocks_make_room_for_a_coarse_one_where_the_budget_is_far():
    # 40 + 40 + 10 x 3 leave 11 of 121 unused; a third 40 fits without the small ones.
    counts = [OpenCounts(3, least=0), OpenCounts(10, least=0)]
    scores = np.arange(13, 0, -1).astype("float32")
    weights = np.array([40.0] * 3 + [3.0] * 10, "float32")
    keep = land(scores, counts, weights, 121 / 150)
    assert keep.tolist() == [True] * 3 + [False] * 10


def land(scores, counts, weights, target, **options):
    def fraction(measure, keep):
        return keras.ops.sum(keep * weights) / weights.sum()

    groups = np.repeat(np.arange(len(counts)), [group.size for group in counts])
    targets = {"macs": target}
    return np.array(land_on_budget(scores, groups, counts, fraction, targets, **options)) > 0


def _starts(sizes):
    return np.cumsum([0, *sizes[:-1]])
