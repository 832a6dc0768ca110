"""Training a settled network through its compact copy."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.compaction import WorkingCopy
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.training import shrinking
from tf_kfacprune.training.run_callback import RunCallback, acts_on_batches
from tf_kfacprune.training.shrinking import can_shrink

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def pays_at_once(monkeypatch):
    monkeypatch.setattr(shrinking, "_LEAST_STEPS", 1)
    monkeypatch.setattr(shrinking, "_LARGEST_FRACTION", 1.0)


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(6, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(0.2)(x)
    x = keras.layers.Dense(8, "relu", name="dense")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6, 6, 2)).astype("float32")
    return x, (x[..., 0].mean(axis=(1, 2)) > 0).astype("int64") + (x[:, 0, 0, 1] > 0)


def compiled(optimizer, eager=False, **options):
    pm = kp.PrunableModel(network(), budget=kp.Budget(macs=0.4), seed=1, **options)
    pm.compile(optimizer, LOSS, metrics=["accuracy"], run_eagerly=eager)
    return pm


class Sizes(keras.callbacks.Callback):
    """Notes in every epoch how many weights are trained, and the network's predictions."""

    def __init__(self, x):
        super().__init__()
        self.x, self.trained, self.same = x, [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.trained.append(sum(v.shape.num_elements() for v in self.model.trainee.variables))

    def on_epoch_end(self, epoch, logs=None):
        if self.model.shrunk is not None:
            of_copy = self.model.shrunk.trainee.net.predict(self.x, verbose=0)
            of_network = self.model.net.predict(self.x, verbose=0)
            self.same.append(np.abs(of_copy - of_network).max() / np.abs(of_network).max())


@pytest.mark.parametrize("prune_features", [False, True])
def test_the_working_copy_takes_weights_and_puts_them_back_to_the_bit(prune_features):
    net = insert_gates(network(), prune_features=prune_features)
    gated = GatedNetwork(net)
    (bank,) = gated.sources
    values = np.random.default_rng(0).uniform(0.1, 1.0, bank.size)
    values[::2] = 0.0
    bank.set_values(values)
    x, _ = data()
    before = net.predict(x, verbose=0)
    copy = WorkingCopy(gated)
    np.testing.assert_allclose(net.predict(x, verbose=0), before, atol=1e-5)
    np.testing.assert_allclose(copy.net.predict(x, verbose=0), before, atol=1e-5)
    weights = [np.array(w) for w in net.get_weights()]
    for variable in copy.net.weights:
        variable.assign(variable + 1.0)
    changed = copy.net.get_weights()
    copy.write_back()
    assert any(not np.array_equal(a, b) for a, b in zip(weights, net.get_weights(), strict=True))
    for variable in copy.net.weights:
        variable.assign(variable * 0.0)
    copy.fetch()
    for weight, expected in zip(copy.net.get_weights(), changed, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_settled_network_is_trained_through_its_copy(eager):
    x, y = data()
    pm, sizes = compiled(kp.KFAC(1e-2), eager, phases=kp.Phases(0.0, 0.5)), Sizes(x)
    history = pm.fit(
        x, y, epochs=6, batch_size=32, validation_data=(x, y), callbacks=[sizes], verbose=0
    ).history
    small = kp.compact(pm)
    of_small = sum(v.shape.num_elements() for v in small.trainable_variables)
    assert sizes.trained[0] > of_small
    assert sizes.trained[-1] == of_small
    assert sizes.same
    assert max(sizes.same) < 1e-5
    assert pm.shrunk is None
    assert len(history["macs"]) == len(history["loss"]) == len(history["accuracy"]) == 6
    measured = pm.evaluate(x, y, batch_size=32, verbose=0, return_dict=True)
    assert measured["loss"] == pytest.approx(history["val_loss"][-1], rel=1e-4)
    # The rate of the compiled optimizer has fallen with that of the copy's.
    assert float(pm.optimizer.learning_rate) < 1e-2
    assert int(pm.optimizer.iterations) == 12


def test_a_run_resumed_in_the_middle_is_the_same_run(tmp_path):
    x, y = data()
    options = {"batch_size": 32, "shuffle": False, "verbose": 0}
    phases = kp.Phases(0.0, 0.4)
    whole = compiled(keras.optimizers.Adam(1e-2), eager=True, phases=phases)
    keep = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{epoch}.weights.h5"), save_weights_only=True
    )
    whole.fit(x, y, epochs=6, callbacks=[keep], **options)
    again = compiled(keras.optimizers.Adam(1e-2), eager=True, phases=phases)
    again.load_weights(tmp_path / "4.weights.h5")
    again.fit(x, y, epochs=6, initial_epoch=4, **options)
    for weight, expected in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_weights_that_a_callback_sets_are_trained_on():
    class Zero(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            layer = self.model.net.get_layer("logits")
            layer.kernel.assign(layer.kernel * 0.0)

    x, y = data()
    pm = compiled(keras.optimizers.SGD(0.0), eager=True, phases=kp.Phases(0.0, 0.3))
    pm.fit(x, y, epochs=4, batch_size=32, callbacks=[Zero()], verbose=0)
    assert not np.any(pm.net.get_layer("logits").kernel)


def test_a_run_that_is_interrupted_keeps_what_its_copy_was_trained(monkeypatch):
    trained = []

    def interrupt(callback, batch, logs=None):
        if callback.model.shrunk is not None:
            trained.extend(callback.model.shrunk.trainee.net.get_layer("logits").get_weights())
            raise KeyboardInterrupt

    x, y = data()
    pm = compiled("sgd", eager=True, phases=kp.Phases(0.0, 0.3))
    with monkeypatch.context() as patched:
        patched.setattr(RunCallback, "on_train_batch_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pm.fit(x, y, epochs=6, batch_size=32, verbose=0)
    assert trained
    assert pm.shrunk is None
    small = kp.compact(pm)
    for weight, expected in zip(small.get_layer("logits").get_weights(), trained, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-7)
    history = pm.fit(x, y, epochs=6, initial_epoch=4, batch_size=32, verbose=0).history
    assert len(history["loss"]) == 2


def test_a_settled_network_can_be_trained_through_its_copy():
    pm = compiled(keras.optimizers.Adam(1e-3))
    assert not can_shrink(pm, 10)
    pm.controller.land()
    assert can_shrink(pm, 10)
    assert not can_shrink(pm, 0)
    pm.start_shrunk()
    pm.stop_shrunk()
    assert can_shrink(pm, 0)  # nobody loses the state of the copy by a late resume


def test_a_copy_goes_on_with_the_reduction_that_was_asked_for():
    """Else the copy of a network that is half as sharp would be made half as sharp again."""
    curvature = kp.SpectralRadius(1e-3, reduction_to=0.5)
    pm = compiled(keras.optimizers.Adam(1e-3), curvature=curvature)
    pm.controller.land()
    state = {"evaluations": 25.0, "reference": 8.0, "penalized_average": 3.0, "radius_average": 2.0}
    for name, value in state.items():
        getattr(pm.curvature_penalty, name).assign(value)
    pm.start_shrunk()
    of_copy = pm.trainee.penalty
    assert of_copy is not pm.curvature_penalty
    assert {name: float(getattr(of_copy, name)) for name in state} == state
    assert float(of_copy._limit()) == 4.0


class Clip(keras.callbacks.Callback):
    """Clips a kernel after every batch, and notes what the network predicts."""

    def __init__(self, x):
        super().__init__()
        self.x, self.largest, self.predictions = x, [], []

    def on_train_batch_end(self, batch, logs=None):
        kernel = self.model.net.get_layer("logits").kernel
        kernel.assign(keras.ops.clip(kernel, -0.01, 0.01))
        self.predictions.append(self.model.predict(self.x, verbose=0))

    def on_epoch_end(self, epoch, logs=None):
        kernel = self.model.net.get_layer("logits").kernel
        self.largest.append(float(keras.ops.max(keras.ops.abs(kernel))))


def test_callbacks_between_batches_see_and_change_the_weights_that_are_trained():
    x, y = data()
    pm, clip = compiled(keras.optimizers.SGD(0.5), phases=kp.Phases(0.0, 0.3)), Clip(x[:4])
    pm.fit(x, y, epochs=4, batch_size=16, callbacks=[clip], verbose=0)
    assert pm.has_settled
    assert max(clip.largest) <= 0.0100001
    for before, after in itertools.pairwise(clip.predictions):
        assert not np.array_equal(before, after)


@pytest.mark.parametrize(
    ("callback", "acts"),
    [
        (keras.callbacks.ModelCheckpoint("{epoch}.keras", save_freq=3), False),
        (keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None), False),
        (keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None), True),
        (Sizes(None), False),
        (Clip(None), True),
    ],
    ids=["checkpoint", "epochs", "batches", "own epochs", "own batches"],
)
def test_which_callbacks_act_between_batches(callback, acts):
    assert acts_on_batches(callback) == acts


def test_exclusions_from_weight_decay_are_kept():
    optimizer = kp.KFAC(1e-3, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    pm = compiled(optimizer)
    pm.controller.land()
    assert not can_shrink(pm, 10)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (keras.optimizers.Adam(1e-3, use_ema=True), {}),
        (keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(1e-3, 9, 0.9)), {}),
        (kp.KFAC(1e-3, damping=keras.optimizers.schedules.ExponentialDecay(1e-3, 9, 0.9)), {}),
        (kp.KFAC("auto"), {}),
        (keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2), {}),
        (keras.optimizers.Adam(1e-3), {"shrink": False}),
    ],
    ids=["ema", "schedule", "damping", "auto", "accumulation", "unwanted"],
)
def test_what_would_train_differently_is_trained_at_full_size(optimizer, options):
    pm = compiled(optimizer, **options)
    pm.controller.land()
    assert not can_shrink(pm, 10)
