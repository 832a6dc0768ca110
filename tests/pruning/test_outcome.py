"""Outcomes of budgets: asked, achieved, and the reason where they differ."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune import PrunableModel
from tf_kfacprune.errors import BudgetError
from tf_kfacprune.graph import CostModel, analyze
from tf_kfacprune.pruning import Budget


def chain():
    net = keras.Sequential([keras.Input((20,)), layers.Dense(10, name="fc"), layers.Dense(4)])
    net.build()
    return net


def landed(budget, **kwargs):
    pm = PrunableModel(chain(), budget, **kwargs)
    rng = np.random.default_rng(0)
    pm.controller.gate_parameters[0].assign(rng.normal(size=10))
    pm.controller.land()
    return pm


def test_the_reason_names_what_could_reopen_and_what_that_would_cost():
    outcome = landed(Budget(macs=0.55)).budget_outcomes()["macs"]  # 24 MACs per neuron of 240
    assert (outcome.asked, outcome.achieved) == (0.55, 0.5)
    assert outcome.ratio == pytest.approx(0.5 / 0.55)
    assert outcome.reason == (
        "the cheapest that could reopen, 1 neuron of fc, would make macs=0.6 of 0.55"
    )
    assert str(outcome) == f"asked 0.55, achieved 0.5: {outcome.reason}"


def test_a_budget_that_is_just_met_needs_no_reason():
    outcome = landed(Budget(macs=0.3)).budget_outcomes()["macs"]
    assert outcome.achieved == pytest.approx(0.3)
    assert outcome.achieved <= 0.3
    assert landed(Budget(macs=0.5)).budget_outcomes()["macs"].reason is None


def test_the_bound_that_decides_is_named_for_the_others():
    outcomes = landed(Budget(macs=0.3, params=0.9)).budget_outcomes()
    assert outcomes["params"].reason.startswith("macs decides: the cheapest")
    assert "would make macs=0.4 of 0.3" in outcomes["params"].reason


def test_rounded_channels_reopen_together():
    outcome = landed(Budget(macs=0.7), round_to=4).budget_outcomes()["macs"]
    assert "4 neurons of fc, would make macs=0.8 of 0.7" in outcome.reason


def test_before_landing_the_network_has_not_arrived():
    outcome = PrunableModel(chain(), Budget(macs=0.5)).budget_outcomes()["macs"]
    assert (outcome.achieved, outcome.reason) == (1.0, "the gates have not settled yet")
    assert PrunableModel(chain()).budget_outcomes() == {}


def test_gates_set_by_hand_are_noticed():
    pm = PrunableModel(chain(), Budget(macs=0.5))
    pm.gated.sources[0].set_values(np.eye(10)[0])
    assert "not set by the budget" in pm.budget_outcomes()["macs"].reason


def test_absolute_bytes_are_asked_and_reported_in_bytes():
    dense = CostModel(analyze(chain())).dense("bytes")
    asked = round(0.9 * dense)
    outcome = landed(Budget(bytes=asked)).budget_outcomes()["bytes"]
    assert outcome.asked == asked
    assert asked - 100 - 4 * 21 - 16 <= outcome.achieved <= asked
    with pytest.raises(BudgetError, match=r"bytes=100 cannot be reached.*Ask for at least \d{4}"):
        PrunableModel(chain(), Budget(bytes=100))


def test_more_bytes_than_the_dense_file_leave_everything_open():
    pm = PrunableModel(chain(), Budget(bytes=10**6))
    assert pm.controller.has_settled
    assert pm.budget_outcomes()["bytes"].reason == "the dense network is within the budget"


def test_a_budget_of_latency_needs_a_table():
    with pytest.raises(BudgetError, match=r"latency_table=kp\.export\.latency_table"):
        PrunableModel(chain(), Budget(latency=0.5))
