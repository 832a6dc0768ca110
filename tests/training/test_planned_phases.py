"""Phases outside of one `fit`, saving in each of them, callbacks that watch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GatePhase
from tf_kfacprune.training import shrinking

L = keras.layers
to_numpy = keras.ops.convert_to_numpy
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype("int32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PHASES = kp.Phases(0.25, 0.5)
STEPS = 16  # 4 epochs of 4: warm-up, prune, prune, settle


def _model(normalized=True, eager=True, optimizer=None, **arguments):
    """Eager, as tracing the steps takes longer than taking sixteen."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = L.Dense(12, "relu", name="hidden")(inputs)
    x = L.BatchNormalization(name="norm")(x) if normalized else x
    net = keras.Model(inputs, L.Dense(2, name="logits")(x))
    arguments = {"policy": kp.KFACSaliency(every=2), "phases": PHASES, "seed": 0, **arguments}
    model = kp.PrunableModel(net, kp.Budget(macs=0.5), **arguments)
    model.compile(optimizer or kp.KFAC(0.02, factor_every=2), LOSS, run_eagerly=eager)
    return model


def _data():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)


def _assert_equal(one, other):
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b), err_msg=a.path)


@pytest.fixture(scope="module", name="saved")
def saved_epochs(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module", name="whole")
def whole_run(saved):
    """One `fit` from beginning to end, saved as `1.keras` to `4.keras` after its epochs."""
    model = _model()
    saving = keras.callbacks.ModelCheckpoint(str(saved / "{epoch}.keras"))
    model.fit(_data(), epochs=4, shuffle=False, verbose=0, callbacks=[saving])
    return model


def test_steps_outside_of_fit_leave_the_gates_open():
    model = _model()
    for batch in _data():
        logs = model.train_on_batch(*batch, return_dict=True)
    assert logs["macs"] == 1.0
    assert model.controller.phase_now() == GatePhase.HELD_OPEN
    assert int(model.controller.step) == 0
    with pytest.raises(InvalidArgumentError, match="total_steps=0"):
        model.plan_phases(0)
    with pytest.raises(InvalidArgumentError, match="not compiled"):
        kp.PrunableModel(model.net, kp.Budget(macs=0.5)).plan_phases(4)


def test_planned_steps_of_train_on_batch_are_those_of_fit(whole):
    model = _model()
    model.plan_phases(STEPS)
    for _ in range(4):
        for batch in _data():
            model.train_on_batch(*batch)
    # A run that is one of several calls says so, nothing else differs.
    model.controller.is_whole.assign(False)
    _assert_equal(model, whole)


@pytest.mark.slow
def test_planned_steps_of_a_loop_of_ones_own_are_those_of_fit(whole):
    model = _model(eager=False)
    model.plan_phases(STEPS)
    step = tf.function(lambda x, y: model.train_step((x, y)))
    for _ in range(4):
        for batch in _data():
            logs = step(*batch)
    assert float(logs["macs"]) <= 0.5
    for a, b in zip(model.net.weights, whole.net.weights, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-3, atol=1e-4, err_msg=a.path)


def test_a_planned_run_may_be_made_of_several_fits(whole, recwarn):
    model = _model()
    model.plan_phases(STEPS)
    for _ in range(4):
        model.fit(_data(), epochs=1, shuffle=False, verbose=0)
    model.controller.is_whole.assign(False)
    _assert_equal(model, whole)
    assert not [w for w in recwarn if "settled" in str(w.message) or "hardly" in str(w.message)]


@pytest.mark.parametrize("epoch", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3))])
def test_a_run_saved_in_any_phase_goes_on_bit_equal(epoch, whole, saved):
    resumed = keras.models.load_model(saved / f"{epoch}.keras")
    resumed.fit(_data(), epochs=4, initial_epoch=epoch, shuffle=False, verbose=0)
    _assert_equal(resumed, whole)


def test_a_run_saved_while_a_compact_copy_is_trained_goes_on_bit_equal(monkeypatch, tmp_path):
    monkeypatch.setattr(shrinking, "_LEAST_STEPS", 1)
    monkeypatch.setattr(shrinking, "_LARGEST_FRACTION", 1.0)
    whole, was_shrunk = _model(phases=kp.Phases(0.0, 0.3)), []

    class Saving(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            was_shrunk.append(self.model.shrunk is not None)
            self.model.save(tmp_path / f"{epoch + 1}.keras")

    whole.fit(_data(), epochs=5, shuffle=False, verbose=0, callbacks=[Saving()])
    assert was_shrunk == [False, False, True, True, True]
    resumed = keras.models.load_model(tmp_path / "3.keras")
    resumed.fit(_data(), epochs=5, initial_epoch=3, shuffle=False, verbose=0)
    _assert_equal(resumed, whole)


@pytest.mark.parametrize(
    "arguments",
    [pytest.param({}, marks=pytest.mark.slow), {"steps_per_execution": 3}],
    ids=str,
)
def test_compiled_steps_give_the_same_network(arguments, whole):
    model = _model()
    model.compile(kp.KFAC(0.02, factor_every=2), LOSS, **arguments)
    model.fit(_data(), epochs=4, shuffle=False, verbose=0)
    assert model.controller.phase_now() == GatePhase.SETTLED
    np.testing.assert_array_equal(model.gated.gate_values(), whole.gated.gate_values())
    for a, b in zip(model.net.weights, whole.net.weights, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-3, atol=1e-4, err_msg=a.path)


@pytest.mark.slow
def test_xla_prunes_to_the_budget():
    model = _model(normalized=False)
    model.compile(kp.KFAC(0.02, factor_every=2), LOSS, jit_compile=True)
    history = model.fit(_data(), epochs=4, shuffle=False, verbose=0).history
    assert history["macs"][-1] <= 0.5
    assert np.isfinite(history["loss"]).all()


# Keras itself counts one step too many of such data.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_of_unknown_length_are_pruned_once_their_steps_are_told():
    data = _data().filter(lambda x, y: True)
    assert int(data.cardinality()) == tf.data.UNKNOWN_CARDINALITY
    model = _model(optimizer=keras.optimizers.Adam(0.02))
    with pytest.raises(InvalidArgumentError, match="steps_per_epoch"):
        model.fit(data, epochs=4, shuffle=False, verbose=0)
    history = model.fit(
        data.repeat(), epochs=4, steps_per_epoch=4, shuffle=False, verbose=0
    ).history
    assert history["macs"][-1] <= 0.5
    planned = _model(optimizer=keras.optimizers.Adam(0.02))
    planned.plan_phases(STEPS)
    history = planned.fit(data, epochs=4, shuffle=False, verbose=0).history
    assert history["macs"][-1] <= 0.5


def test_a_callback_reads_gate_values_after_every_step():
    model, seen = _model(), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            phase, values = self.model.controller.phase_now(), self.model.gated.gate_values()
            seen.append((phase, values, logs["macs"]))

    model.fit(_data(), epochs=4, shuffle=False, verbose=0, callbacks=[Watch()])
    assert [phase for phase, _, _ in seen] == (
        [GatePhase.HELD_OPEN] * 4 + [GatePhase.PRUNING] * 8 + [GatePhase.SETTLED] * 4
    )
    for _, values, macs in seen:  # every neuron costs the same
        assert macs == pytest.approx(np.mean(values > 0))


def test_frozen_weights_stay_to_the_bit_through_a_compact_copy(monkeypatch):
    monkeypatch.setattr(shrinking, "_LEAST_STEPS", 1)
    monkeypatch.setattr(shrinking, "_LARGEST_FRACTION", 1.0)
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [keras.Input((6,)), L.Dense(12, "relu"), L.BatchNormalization(), L.Dense(12, "relu")]
    )
    base.layers[1].moving_mean.assign(RNG.normal(size=12))
    base.trainable = False
    inputs = keras.Input((6,))
    net = keras.Model(inputs, L.Dense(2, name="head")(L.Dense(8, "relu")(base(inputs))))
    before, head = [to_numpy(w) for w in base.weights], to_numpy(net.get_layer("head").kernel)
    model = kp.PrunableModel(net, kp.Budget(macs=0.4), phases=kp.Phases(0.0, 0.3), seed=0)
    model.compile(kp.KFAC(3e-2, weight_decay=0.1), LOSS, run_eagerly=True)
    shrunk = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda n, logs: shrunk.append(model.shrunk is not None)
    )
    model.fit(_data(), epochs=5, shuffle=False, verbose=0, callbacks=[watch])
    assert shrunk[-1]
    for old, new in zip(before, base.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(new), old, err_msg=new.path)
    assert not np.array_equal(net.get_layer("head").kernel, head)


def test_layers_frozen_and_freed_between_compilations_have_blocks_of_their_own():
    model = _model(normalized=False)
    model.net.get_layer("hidden").trainable = False
    frozen = to_numpy(model.net.get_layer("hidden").kernel)
    model.compile(kp.KFAC(0.02), LOSS, run_eagerly=True)
    assert [block.layer.name for block in model.blocks] == ["logits"]
    model.fit(_data(), epochs=4, shuffle=False, verbose=0)
    np.testing.assert_array_equal(model.net.get_layer("hidden").kernel, frozen)
    model.net.get_layer("hidden").trainable = True
    model.compile(kp.KFAC(0.02), LOSS, run_eagerly=True)
    assert [block.layer.name for block in model.blocks] == ["hidden", "logits"]
    model.fit(_data(), epochs=1, shuffle=False, verbose=0)
    assert not np.array_equal(model.net.get_layer("hidden").kernel, frozen)
