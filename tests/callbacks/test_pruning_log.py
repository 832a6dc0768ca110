"""PruningLog: what it writes is read back from the event files."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.callbacks.pruning_state import pruning_state
from tf_kfacprune.errors import ExportError, InvalidArgumentError

pytest.importorskip("tensorboard")

EPOCHS, STEPS = 4, 5
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(STEPS * 8, 6)).astype("float32"), RNG.integers(0, 3, STEPS * 8)


def prunable(budget=None):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(10, activation="relu", name="fc1"),
            keras.layers.Dense(8, activation="relu", name="fc2"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    pm = kp.PrunableModel(
        model, budget, policy=budget and "magnitude", phases=kp.Phases(0.25, 0.25), seed=0
    )
    pm.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return pm


def events(folder):
    """tag -> {step: value} of every scalar, histogram (as buckets) and text below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return {
        tag: {e.step: tensor_util.make_ndarray(e.tensor_proto) for e in accumulator.Tensors(tag)}
        for tag in accumulator.Tags()["tensors"]
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with both callbacks in one folder, and the states that somebody beside them saw.

    A further run of the settled network logs by batches, into another folder.
    """
    folder, by_batches = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("by_batches")
    pm = prunable(kp.Budget(macs=0.5, params=0.8))
    states = []
    callbacks = [
        keras.callbacks.TensorBoard(str(folder), update_freq=3, write_graph=False),
        kp.callbacks.PruningLog(folder),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: states.append(pruning_state(pm))),
    ]
    history = pm.fit(X, Y, batch_size=8, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    pm.optimizer.learning_rate = 1e-3
    log = kp.callbacks.PruningLog(by_batches, update_freq=2, histograms=False)
    pm.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[log])
    return SimpleNamespace(
        model=pm, folder=folder, by_batches=by_batches, states=states, history=history.history
    )


def test_costs_are_those_of_the_network_after_every_epoch(run):
    pm, history = run.model, run.history
    found = events(run.folder / "pruning")
    dense = 6 * 10 + 10 * 8 + 8 * 3
    for k in range(EPOCHS):
        a, b = (int(found[f"neurons/{name}"][k]) for name in ("fc1", "fc2"))
        macs = 6 * a + a * b + b * 3
        assert found["pruning/macs"][k] == macs
        assert found["pruning/parameters"][k] == macs + a + b + 3
        assert found["pruning/macs_left"][k] == np.float32(macs / dense)
        assert found["pruning/macs_left"][k] == pytest.approx(history["macs"][k], rel=1e-6)
        assert a + b == history["neurons"][k]
    assert [int(v) for v in found["pruning/phase"].values()] == [0, 1, 2, 2]
    small = kp.compact(pm)
    assert found["pruning/parameters"][EPOCHS - 1] == small.count_params()


def test_budget_is_asked_against_achieved_with_the_reason_at_the_end(run):
    pm = run.model
    found, outcomes = events(run.folder / "pruning"), pm.budget_outcomes()
    assert set(outcomes) == {"macs", "params"}
    for measure, outcome in outcomes.items():
        last = {k: float(found[f"budget/{measure}_{k}"][EPOCHS - 1]) for k in ("asked", "achieved")}
        assert last == {
            "asked": np.float32(outcome.asked),
            "achieved": np.float32(outcome.achieved),
        }
        assert found[f"budget/{measure}_ratio"][0] == np.float32(1 / outcome.asked)
    (text,) = found["budget"].values()
    assert text.item().decode() == "\n".join(f"- {m}: {o}" for m, o in outcomes.items())


def test_histograms_hold_the_score_of_every_neuron(run):
    found = events(run.folder / "pruning")
    for number, size in enumerate((10, 8)):
        for k in range(EPOCHS):
            scores = run.states[k].groups[number].scores
            left, right, count = found[f"scores/fc{number + 1}"][k].T
            assert count.sum() == size == len(scores)
            assert (left[0], right[-1]) == pytest.approx((scores.min(), scores.max()))


def test_events_of_keras_lie_beside_ours_and_neither_thins_out_the_other(run):
    ours, keras_own = events(run.folder / "pruning"), events(run.folder / "train")
    # TensorBoard records every third step only, which goes for all that is written meanwhile.
    assert list(ours["pruning/macs"]) == list(range(EPOCHS))
    assert keras_own["epoch_loss"]
    assert not set(ours) & set(keras_own)


def test_steps_are_those_of_the_optimizer_when_asked_for_by_batches(run):
    found = events(run.by_batches / "pruning")
    done = EPOCHS * STEPS
    assert list(found["pruning/macs"]) == [done + k for k in (2, 4, 6, 8, 10)]
    assert list(found["budget"]) == [done + 2 * STEPS]
    assert not [tag for tag in found if tag.startswith("scores/")]


def test_a_model_without_gates_has_nothing_to_log_and_another_model_is_refused(tmp_path):
    pm = prunable()
    pm.fit(X, Y, batch_size=8, verbose=0, callbacks=[kp.callbacks.PruningLog(tmp_path)])
    assert events(tmp_path / "pruning") == {}
    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="out")], name="plain")
    plain.compile("sgd", "mse")
    with pytest.raises(InvalidArgumentError, match=r"model 'plain' of type Sequential"):
        plain.fit(X, X[:, :3], verbose=0, callbacks=[kp.callbacks.PruningLog(tmp_path)])


@pytest.mark.parametrize("frequency", [0, -1, True, 2.5, "batch", None])
def test_wrong_frequencies_are_refused(tmp_path, frequency):
    with pytest.raises(InvalidArgumentError, match="update_freq"):
        kp.callbacks.PruningLog(tmp_path, update_freq=frequency)


def test_wrong_folders_and_a_missing_tensorboard_are_named(tmp_path, monkeypatch):
    with pytest.raises(InvalidArgumentError, match="log_dir"):
        kp.callbacks.PruningLog(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install tensorboard"):
        kp.callbacks.PruningLog(tmp_path)
