"""States of a training: whole at any moment, in the middle of an epoch, on a full disk."""

from __future__ import annotations

import contextlib
import json
import resource

import keras
import numpy as np
import pytest

from tf_kfacprune.cli.backup import Backup, progress
from tf_kfacprune.cli.batches import EpochBatches
from tf_kfacprune.cli.stopping import Stopped, Stopping
from tf_kfacprune.errors import InvalidArgumentError

EPOCHS, SIZE = 3, 4
X = np.random.default_rng(0).normal(size=(18, 3)).astype("float32")
Y = (X @ np.array([[1.0], [-2.0], [0.5]])).astype("float32")


class StopAt(keras.callbacks.Callback):
    """A signal that comes in a certain step, counted over the whole run."""

    def __init__(self, stopping, step):
        super().__init__()
        self.stopping, self.step, self.seen = stopping, step, 0

    def on_train_batch_begin(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.step:
            self.stopping.receive(15)


def trained(folder, stop_at=None, more=()):
    """Weights after a run on the state in a folder."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    stopping = Stopping()
    batches = EpochBatches(X, Y, SIZE, seed=7)
    callbacks = [batches, Backup(folder, batches, stopping), StopAt(stopping, stop_at), *more]
    fit = {"shuffle": False, "epochs": EPOCHS, "verbose": 0, "callbacks": callbacks}
    if stop_at is None:
        model.fit(batches.dataset, **fit)
    else:
        with pytest.raises(Stopped, match="SIGTERM") as stopped:
            model.fit(batches.dataset, **fit)
        assert stopped.value.status == 143
    return model.get_weights()


def test_order_follows_from_seed_and_epoch_alone():
    def order(seed, epoch, start=0):
        batches = EpochBatches(X, np.arange(18), SIZE, seed)
        batches.start = start
        batches.on_epoch_begin(epoch)
        return [int(label) for _, labels in batches.dataset for label in labels]

    first = order(7, 3)
    assert sorted(first) == list(range(18))
    assert order(7, 3) == first
    assert order(7, 4) != first
    assert order(8, 3) != first
    assert order(7, 3, start=2) == first[2 * SIZE :]
    batches = EpochBatches(X, Y, SIZE, 7)
    assert batches.steps == batches.dataset.cardinality() == 5
    for inputs, labels in batches.dataset:
        np.testing.assert_allclose(inputs @ [[1.0], [-2.0], [0.5]], labels, atol=1e-6)


@pytest.mark.parametrize(
    ("stop_at", "said"),
    [
        (3, "0 of 3 epochs and 3 of 5 steps of the next"),
        (9, "1 of 3 epochs and 4 of 5 steps of the next"),
        (10, "2 of 3 epochs"),
    ],
)
def test_resumed_run_equals_the_undisturbed_one_to_the_bit(tmp_path, stop_at, said):
    expected = trained(tmp_path / "undisturbed")
    trained(tmp_path / "state", stop_at)
    assert progress(tmp_path / "state") == said
    if stop_at == 9:  # interrupted twice in one epoch
        trained(tmp_path / "state", 2)
        assert progress(tmp_path / "state") == "2 of 3 epochs and 1 of 5 steps of the next"
    for found, weights in zip(trained(tmp_path / "state"), expected, strict=True):
        np.testing.assert_array_equal(found, weights)


def test_weights_that_cannot_be_read_any_more_are_taken_from_the_state_before(tmp_path):
    expected = trained(tmp_path / "undisturbed")
    trained(tmp_path / "state", 9)
    (tmp_path / "state" / "latest.weights.h5").write_bytes(b"rotten")
    for found, weights in zip(trained(tmp_path / "state"), expected, strict=True):
        np.testing.assert_array_equal(found, weights)


def test_state_of_another_model_is_refused(tmp_path):
    trained(tmp_path / "state", 9)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    batches = EpochBatches(X, Y, SIZE, seed=7)
    with pytest.raises(InvalidArgumentError, match="state of the interrupted run cannot be rest"):
        model.fit(
            batches.dataset,
            verbose=0,
            shuffle=False,
            callbacks=[batches, Backup(tmp_path / "state", batches, Stopping())],
        )


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1000 bytes; HDF5 would end the process at the second failure."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class FullDisk(keras.callbacks.Callback):
    """The disk is full while the second epoch runs."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.full = full_disk()
            self.full.__enter__()

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.full.__exit__(None, None, None)


def test_full_disk_is_told_and_keeps_the_last_state_and_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("tf_kfacprune.cli.backup._TIMES_AS_LONG", 0)  # after every step
    with pytest.warns(UserWarning, match=r"cannot be saved.*Training goes on.*1 of 3 epochs"):
        trained(tmp_path / "state", more=[FullDisk()])
    assert progress(tmp_path / "state") == "3 of 3 epochs"
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert names == {
        "latest.weights.h5",
        "latest.weights.h5.bkp",
        "training_metadata.json",
        "training_metadata.json.bkp",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert json.loads((tmp_path / "state" / "training_metadata.json").read_text()) == {
        "epoch": 3,
        "epochs": 3,
        "batch": 0,
        "batches": 5,
    }
