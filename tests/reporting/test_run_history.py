"""A run read from what `fit` returned: epochs, phases and what belongs to which epoch."""

from __future__ import annotations

from types import SimpleNamespace

import keras
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.reporting.run_history import run_of


def history(epochs, steps=10, first=0, planned=None, **series):
    found = keras.callbacks.History()
    found.epoch = list(range(first, first + epochs))
    found.params = {"epochs": planned or first + epochs, "steps": steps, "verbose": 0}
    found.history = series
    return found


def model(budget=None, **attributes):
    return SimpleNamespace(budget=budget, phases=kp.Phases(0.1, 0.4), **attributes)


def test_values_stand_at_the_end_of_their_epoch_and_phases_where_they_began():
    logged = history(5, loss=[5.0, 4.0, 3.0, 2.0, 1.0], macs=[1.0, 0.6, 0.3, 0.3, 0.3])
    run = run_of(model(kp.Budget(macs=0.3)), logged)
    assert (run.first, run.last) == (0, 5)
    assert run.series["loss"] == ((1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (5, 1.0))
    assert run.prune == (0.5, 2.5)
    assert not run.settled


def test_a_resumed_run_has_the_phases_of_the_whole():
    logged = history(2, first=1, planned=5, loss=[2.0, 1.0], macs=[0.8, 0.5])
    run = run_of(model(kp.Budget(macs=0.3)), logged)
    assert (run.first, run.last, run.prune) == (1, 3, (0.5, 2.5))


def test_a_further_run_of_a_settled_network_has_no_phases():
    logged = history(5, loss=[5.0, 4.0, 3.0, 2.0, 1.0], macs=[0.3] * 5)
    run = run_of(model(kp.Budget(macs=0.3)), logged)
    assert run.settled
    assert run.prune is None


@pytest.mark.parametrize("budget", [None, kp.Budget(macs=1.0)])
def test_without_a_budget_nothing_is_shaded(budget):
    run = run_of(model(budget), history(2, loss=[2.0, 1.0], macs=[1.0, 1.0]))
    assert run.prune is None
    assert not run.settled


def test_values_of_every_other_validation_belong_to_their_epochs():
    logged = history(5, loss=[5.0, 4.0, 3.0, 2.0, 1.0], val_loss=[4.5, 2.5], odd=[1.0, 2.0, 3.0])
    run = run_of(model(), logged)
    assert run.series["val_loss"] == ((2, 4.5), (4, 2.5))
    assert "odd" not in run.series


def test_metrics_of_the_user_are_told_from_those_of_pruning():
    values = [1.0, 2.0]
    names = "accuracy val_accuracy auc macs expected_macs params lambda_macs neurons learning_rate"
    logged = history(2, loss=values, val_loss=values, **dict.fromkeys(names.split(), values))
    run = run_of(model(), logged)
    assert run.metrics == ("accuracy", "auc")
    assert run.costs == ("macs", "params")


def test_the_history_that_the_model_remembers_is_the_default():
    logged = history(1, loss=[1.0])
    assert run_of(model(history=logged)).series["loss"] == ((1, 1.0),)
    assert run_of(model()) is None
    assert run_of(model(history="something of the user's")) is None
    assert run_of(model(), history(0)) is None
    with pytest.raises(InvalidArgumentError, match="Received: dict"):
        run_of(model(), {"loss": [1.0]})
