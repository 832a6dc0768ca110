"""The methods that the frontier compares, and the file of finished runs."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

import tf_kfacprune as kp

SLOW = ("taylor_compensated", "slimming")


@pytest.fixture(name="frontier", scope="module")
def benchmark(load_benchmark):
    return load_benchmark("frontier")


@pytest.fixture(name="task")
def small_task(frontier):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, "relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    case = dataclasses.replace(frontier.CASES["lenet300"], epochs=3, batch_size=16, adam_rate=0.05)
    y = (x[:, 0] > 0).astype("int64")
    return frontier.Run(case, model, x, y, 0, frontier.peers.SharedStarts(), kp.Budget(params=0.4))


def test_finished_runs_are_known_when_the_file_is_opened_again(frontier, tmp_path):
    frontier.Records("runs.jsonl", tmp_path).add({"seed": 0}, {"error": 1.5})
    records = frontier.Records("runs.jsonl", tmp_path)
    assert {"seed": 0} in records
    assert {"seed": 1} not in records


def test_every_method_has_runs_in_every_case(frontier):
    for name, case in frontier.CASES.items():
        plans = list(frontier.plans(name))
        left_out = set() if case.varied else set(frontier.VARIATIONS)
        assert {method for method, *_ in plans} == set(frontier.METHODS) - left_out
        of_ours = [budget for method, _, budget, _ in plans if method == "ours"]
        assert [budget.targets for budget in of_ours] == list(case.targets.values())


@pytest.mark.parametrize(
    "method", ["magnitude", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_peers_with_a_budget_obey_it(frontier, task, method):
    small = frontier.METHODS[method](task)
    assert small.count_params() <= 0.4 * task.model.count_params()


def test_a_narrow_network_has_the_same_share_of_every_layer_and_new_weights(frontier, task):
    hidden = keras.layers.Dense(4, "relu")(task.model.layers[1].output)
    model = keras.Model(task.model.input, keras.layers.Dense(2)(hidden))
    run = dataclasses.replace(task, model=model, budget=kp.Budget(params=0.45))
    narrowed = frontier.peers.narrowed(run)
    assert [w.shape for w in narrowed.weights[::2]] == [(6, 4), (4, 2), (2, 2)]  # halves
    kernel = keras.ops.convert_to_numpy(narrowed.weights[0])
    assert not np.isin(kernel, keras.ops.convert_to_numpy(model.weights[0])).any()
    trained = frontier.METHODS["narrow"](run)
    assert trained.count_params() == narrowed.count_params()


def test_ranks_are_shares_of_the_group_that_are_smaller(frontier):
    ranks = frontier.peers.ranks_in_groups(np.array([5.0, 9.0, 2.0, 7.0]), np.array([0, 1, 0, 1]))
    np.testing.assert_array_equal(ranks, [0.5, 0.5, 0.0, 0.0])


@pytest.mark.slow
def test_runs_that_begin_alike_are_begun_once_and_end_alike(frontier, task, monkeypatch):
    epochs = []
    fit = frontier.Run.fit
    monkeypatch.setattr(
        frontier.Run, "fit", lambda run, model, n: epochs.append(n) or fit(run, model, n)
    )
    weights = []
    for _ in range(2):
        model = keras.models.clone_model(task.model)
        small = frontier.METHODS["magnitude"](dataclasses.replace(task, model=model))
        weights.append(small.get_weights())
    assert epochs == [2, 1, 1]
    assert task.starts.seconds_spared > 0
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_high_price_closes_gates(frontier, task):
    # At the rates of the benchmark, though in twelve steps.
    case = dataclasses.replace(task.case, adam_rate=1e-3)
    small = frontier.METHODS["hard_concrete"](dataclasses.replace(task, case=case, strength=100.0))
    assert small.count_params() < task.model.count_params()


def test_labels_of_the_plot_stand_apart(frontier, figures, overlapping):
    frontier.plot()
    (figure,) = figures
    assert overlapping(figure) == []
