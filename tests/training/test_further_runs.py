"""A second `fit`, a longer one, another optimizer in between; what callbacks may look like."""

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
FIT = {"batch_size": 32, "verbose": 0}


class Rates(keras.callbacks.Callback):
    """Notes the learning rate at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_epoch_end(self, epoch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))


def _network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)]
    )


@pytest.fixture(name="finished")
def finished_run():
    model = kp.PrunableModel(_network(), kp.Budget(macs=0.5), seed=0)
    model.compile(keras.optimizers.Adam(0.05), LOSS, run_eagerly=True)
    model.fit(X, Y, epochs=5, **FIT)
    return model


def test_a_longer_run_decays_the_learning_rate_to_its_new_end(finished):
    rates = Rates()
    finished.fit(X, Y, epochs=10, initial_epoch=5, callbacks=[rates], **FIT)
    assert 0.05 > rates.rates[0] > 1e-2
    assert rates.rates[-1] < 2e-3
    assert finished.budget_outcomes()["macs"].achieved <= 0.5


def test_a_further_run_without_a_learning_rate_says_so(finished):
    with pytest.warns(UserWarning, match="hardly anything will be trained"):
        finished.fit(X, Y, epochs=1, **FIT)


@pytest.mark.parametrize("way", ["set", "compile"])
def test_a_further_run_takes_the_learning_rate_that_is_set(finished, way, recwarn):
    if way == "set":
        finished.optimizer.learning_rate = 0.01
    else:
        finished.compile(kp.KFAC(0.01), LOSS, run_eagerly=True)
    before, rates = finished.net.get_weights(), Rates()
    finished.fit(X, Y, epochs=2, callbacks=[rates], **FIT)
    assert rates.rates == pytest.approx([0.01, 0.01])
    after = finished.net.get_weights()
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(after, before, strict=True))
    assert not [w for w in recwarn if "hardly" in str(w.message)]


def test_an_optimizer_compiled_in_the_middle_of_a_run_brings_its_learning_rate():
    model, rates = kp.PrunableModel(_network(), kp.Budget(macs=0.5), seed=0), Rates()
    model.compile(kp.KFAC(0.05), LOSS, run_eagerly=True)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 5

    model.fit(X, Y, epochs=10, callbacks=[Stop()], **FIT)
    model.compile(kp.KFAC(1e-3), LOSS, run_eagerly=True)
    model.fit(X, Y, epochs=10, initial_epoch=6, callbacks=[rates], **FIT)
    assert max(rates.rates) < 1e-3
    assert rates.rates[-1] < 1e-4


@pytest.mark.parametrize("kind", ["list", "single", "container", "positional"])
def test_callbacks_come_as_in_keras(kind):
    model, seen = kp.KFACModel(_network(), seed=0), Rates()
    model.compile("sgd", LOSS)
    container = keras.callbacks.CallbackList([seen])
    given = {"list": [seen], "single": seen, "container": container}
    if kind == "positional":
        history = model.fit(X, Y, 32, 2, 0, [seen])
    else:
        history = model.fit(X, Y, epochs=2, callbacks=given[kind], **FIT)
    assert len(seen.rates) == len(history.history["loss"]) == 2


@pytest.mark.parametrize("steps", [2, 3, 10, 40, 1000])
@pytest.mark.parametrize("shares", [(0.0, 0.99), (0.05, 0.35), (0.97, 0.02)])
def test_some_step_is_left_to_settle(steps, shares):
    start, end = kp.Phases(*shares).boundaries(steps)
    assert 0 <= start < end < steps


@pytest.mark.parametrize(
    "arguments",
    [
        {"prune_inputs": True},
        {"prune_features": True},
        {"exclude": ["a"]},
        {"round_to": 8},
        {"min_channels": 2},
    ],
)
def test_arguments_without_effect_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(InvalidArgumentError, match=f"no effect: {name}="):
        kp.PrunableModel(_network(), **arguments)
