"""Callbacks of Keras that look for the best epoch or set the learning rate, while pruning."""

import warnings

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.cli.main import main

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# Of 8 epochs with 4 steps each: gates close in steps 4 to 13, and settle in the middle of epoch 3.
PHASES, EPOCHS, LANDING = kp.Phases(0.125, 0.3125), 8, 3
# The unpruned network is by far the best one; of the epochs on the budget, number 5 is.
FIGURES = [0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.75, 0.8]


class Figures(keras.callbacks.Callback):
    """Replaces a figure by chosen ones, and notes what each epoch ended with."""

    def __init__(self, name="val_loss", figures=FIGURES):
        super().__init__()
        self.name, self.figures = name, figures
        self.weights, self.rates = [], []

    def on_epoch_end(self, epoch, logs=None):
        logs[self.name] = self.figures[epoch]
        self.weights.append(self.model.net.get_weights())
        self.rates.append(float(self.model.optimizer.learning_rate))


def compiled(phases=PHASES, rate=0.1):
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)]
    )
    model = kp.PrunableModel(net, kp.Budget(macs=0.5), policy="magnitude", phases=phases, seed=0)
    model.compile(keras.optimizers.SGD(rate), LOSS)
    return model


def fit(model, *callbacks, epochs=EPOCHS, **arguments):
    figures = Figures()
    options = {"batch_size": 16, "shuffle": False, "verbose": 0, **arguments}
    model.fit(X, Y, epochs=epochs, callbacks=[figures, *callbacks], **options)
    return figures


def assert_equal(weights, expected):
    for weight, wanted in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(weight, wanted)


class OwnStopping(keras.callbacks.EarlyStopping):
    """A subclass, as users write them."""


@pytest.mark.parametrize(
    ("kind", "patience", "stops_after"),
    [("EarlyStopping", 0, 6), ("EarlyStopping", 2, 7), ("own", 1, 6), ("EarlyStopping", 30, 7)],
)
def test_early_stopping_restores_the_best_epoch_on_the_budget(kind, patience, stops_after, recwarn):
    kinds = {"EarlyStopping": keras.callbacks.EarlyStopping, "own": OwnStopping}
    stop = kinds[kind](patience=patience, restore_best_weights=True)
    model = compiled()
    figures = fit(model, stop)
    assert (stop.best, stop.best_epoch) == (0.7, 5)
    assert len(figures.weights) == stops_after + 1
    assert_equal(model.net.get_weights(), figures.weights[5])
    assert model.has_settled
    assert model.budget_outcomes()["macs"].achieved <= 0.5
    kp.compact(model)
    assert not [w for w in recwarn if "budget" in str(w.message)]


def test_patience_counts_from_landing_on():
    """The best epoch is that of the landing; three worse ones are one too many."""
    stop = keras.callbacks.EarlyStopping("val_rising", patience=3, mode="min")
    rising = Figures("val_rising", list(range(EPOCHS)))
    assert len(fit(compiled(), rising, stop).weights) == LANDING + 1 + 3


def test_no_weights_are_put_back_where_training_ends_before_landing():
    stop = keras.callbacks.EarlyStopping(restore_best_weights=True)
    model = compiled()
    end = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1)
    )
    with pytest.warns(UserWarning, match="ended before its gates settled"):
        figures = fit(model, end, stop)
    assert_equal(model.net.get_weights(), figures.weights[1])
    assert int(model.controller.step) == 8


def test_only_networks_on_the_budget_are_saved_as_the_best(tmp_path):
    def keep(name, **arguments):
        return keras.callbacks.ModelCheckpoint(
            tmp_path / f"{name}.keras", save_best_only=True, **arguments
        )

    unmet, met = keep("unmet", initial_value_threshold=0.5), keep("0", initial_value_threshold=0.85)
    in_steps = keep("steps", monitor="loss", save_freq=3)
    trained = Figures("trained", [0.0] * LANDING + [0.1, 0.4, 0.3, 0.5, 0.5])
    of_training = keep("trained", monitor="trained", mode="min")
    model = compiled()
    figures = fit(model, keep("best"), unmet, met, trained, of_training, in_steps)
    for name, epoch in [("best", 5), ("0", 5), ("trained", 5)]:
        saved = keras.models.load_model(tmp_path / f"{name}.keras")
        assert saved.has_settled
        assert_equal(saved.net.get_weights(), figures.weights[epoch])
    assert keras.models.load_model(tmp_path / "steps.keras").has_settled
    # Not better than it had to be, before landing it was.
    assert unmet.best == 0.5
    assert not keras.models.load_model(tmp_path / "unmet.keras").has_settled
    # Means over the epoch of the landing are of the unpruned network, too.
    assert of_training.best == 0.3


def test_a_run_of_several_fits_has_one_best_epoch(tmp_path):
    keep = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.weights.h5", save_best_only=True, save_weights_only=True
    )
    model, weights = compiled(), []
    model.plan_phases(EPOCHS * 4)
    for epoch in range(EPOCHS):
        weights += fit(model, keep, epochs=epoch + 1, initial_epoch=epoch).weights
    assert keep.best == 0.7
    model.load_weights(tmp_path / "best.weights.h5")
    assert_equal(model.net.get_weights(), weights[5])


def test_a_scheduler_decides_about_the_learning_rate(recwarn):
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch))
    rates = fit(compiled(), schedule).rates
    assert rates == pytest.approx([0.1 / (1 + epoch) for epoch in range(EPOCHS)])
    assert not [w for w in recwarn if "learning rate" in str(w.message)]


def test_a_plateau_is_one_of_the_settled_network(recwarn):
    plateau = keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.5)
    rates = fit(compiled(), plateau).rates
    # Epochs 6 and 7 are worse than 5; rates are noted before the callback acts.
    assert rates == pytest.approx([0.1] * 7 + [0.05])
    assert not [w for w in recwarn if "learning rate" in str(w.message)]


class Warmup(keras.callbacks.Callback):
    """Sets the learning rate as users' own callbacks do."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def on_epoch_begin(self, epoch, logs=None):
        if self.when == "epoch" and epoch == 6:
            self.model.optimizer.learning_rate = 0.05

    def on_train_batch_begin(self, batch, logs=None):
        if self.when == "batch" and not self.model.has_settled:
            self.model.optimizer.learning_rate = 0.05


@pytest.mark.parametrize("when", ["epoch", "batch"])
def test_a_rate_that_will_be_overwritten_is_told_once_with_who_set_it(when):
    with pytest.warns(UserWarning, match=r"to 0\.05 \(Figures, Warmup\).*decay=False") as told:
        fit(compiled(), Warmup(when))
    assert len([w for w in told if "learning rate" in str(w.message)]) == 1


class Dies(keras.callbacks.Callback):
    """Ends a run before its seventh epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 6:
            raise KeyboardInterrupt


def test_the_rate_of_a_restored_state_is_not_taken_for_one_that_a_callback_sets(tmp_path, recwarn):
    undisturbed = fit(compiled()).rates
    with pytest.raises(KeyboardInterrupt):
        fit(compiled(), keras.callbacks.BackupAndRestore(tmp_path), Dies())
    resumed = fit(compiled(), keras.callbacks.BackupAndRestore(tmp_path)).rates
    assert resumed == undisturbed[6:]
    assert resumed[0] < 0.1
    assert not [w for w in recwarn if "learning rate" in str(w.message)]


def test_without_decay_callbacks_decide(recwarn):
    rates = fit(compiled(kp.Phases(0.125, 0.3125, decay=False)), Warmup("epoch")).rates
    assert rates == pytest.approx([0.1] * 6 + [0.05] * 2)
    assert not [w for w in recwarn if "learning rate" in str(w.message)]


class PutsBack(keras.callbacks.Callback):
    """Puts back weights of an epoch before landing, in a way that nobody can foresee."""

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.kept = self.model.get_weights()

    def on_train_end(self, logs=None):
        self.model.set_weights(self.kept)


def test_unsettled_networks_are_told_by_compact_and_refused_by_the_program(tmp_path, capsys):
    model = compiled()
    with pytest.warns(UserWarning, match="a callback has put back weights of an epoch before that"):
        fit(model, PutsBack())
    assert not model.has_settled
    with pytest.warns(
        UserWarning, match=r"not on its budget \(macs: asked 0.5, achieved .*settled"
    ):
        kp.compact(model)
    model.save(tmp_path / "model.keras")
    arguments = ["compact", f"--model={tmp_path}/model.keras", f"--output={tmp_path}/small.keras"]
    assert main(arguments) == 1
    assert "is not on its budget (macs: asked 0.5" in capsys.readouterr().err
    assert not (tmp_path / "small.keras").exists()


@pytest.mark.parametrize("way", ["same", "counted"])
def test_calls_of_one_epoch_each_are_told_of_plan_phases_once(way):
    model = compiled(kp.Phases(0.25, 0.5, decay=False))
    told = []
    for epoch in range(3):
        first = epoch if way == "counted" else 0
        with warnings.catch_warnings(record=True, action="always") as caught:
            model.fit(X, Y, batch_size=16, epochs=first + 1, initial_epoch=first, verbose=0)
        told.append(
            [str(w.message) for w in caught if "plan_phases(total_steps)" in str(w.message)]
        )
    assert [len(messages) for messages in told] == [0, 1, 0]
    assert "within the one epoch of an earlier call" in told[1][0]


def test_a_terminal_is_told_why_nothing_happens_at_first(capsys, monkeypatch):
    model = kp.KFACModel(compiled().net)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    options = {"batch_size": 32, "verbose": 2}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    model.fit(X, Y, **options)
    assert capsys.readouterr().out.startswith("The first step is traced before it runs")
    model.fit(X, Y, **options)
    assert "traced" not in capsys.readouterr().out
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    model.fit(X, Y, batch_size=32, verbose=0)
    assert "traced" not in capsys.readouterr().out
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)  # a notebook, a log
    model.fit(X, Y, **options)
    assert "traced" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "is_shown"), [("magnitude", False), ("kfac", False), ("hard_concrete", True)]
)
def test_cost_in_expectation_is_shown_only_where_it_differs(policy, is_shown):
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    figures = kp.PrunableModel(net, kp.Budget(macs=0.5), policy=policy).controller.figures()
    assert ("expected_macs" in figures) == is_shown
    assert float(figures["macs"]) == 1.0
