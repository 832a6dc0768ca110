"""Losses and metrics that fit the data and the model, measured as Keras measures them."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.cli import evaluate, train
from tf_kfacprune.cli.command import UsageError
from tf_kfacprune.cli.main import main
from tf_kfacprune.cli.objectives import kind_asked_for, measured, objective_for
from tf_kfacprune.cli.shared import load_data
from tf_kfacprune.errors import NonFiniteError


def objective(small, model, data, *more):
    command = train.command()
    command.parse(["--output_dir=o", f"--data={small / data}.npz", *more])
    dataset = load_data(command.flags, kind_asked_for(command.flags))
    net = keras.models.load_model(small / f"{model}.keras")
    return objective_for(command.flags, net, dataset)


@pytest.mark.parametrize(
    ("model", "data", "more", "loss", "from_logits", "metric"),
    [
        ("out2", "bars", [], "SparseCategoricalCrossentropy", True, "accuracy"),
        ("softmax", "text", [], "SparseCategoricalCrossentropy", False, "accuracy"),
        ("sigmoid", "bars", [], "BinaryCrossentropy", False, "accuracy"),
        ("out1", "text", [], "BinaryCrossentropy", True, "accuracy"),
        ("out3", "several", [], "BinaryCrossentropy", True, "accuracy"),
        ("out2", "onehot", ["--loss=binary_crossentropy"], "BinaryCrossentropy", True, "accuracy"),
        ("out1", "values", [], "MeanSquaredError", None, "mean_absolute_error"),
        ("out1", "bars", ["--loss=mean_absolute_error"], "MeanAbsoluteError", None, None),
        ("out1", "values", ["--metric=mean_squared_error"], "MeanSquaredError", None, None),
    ],
)
def test_what_the_labels_and_the_model_ask_for(small, model, data, more, loss, from_logits, metric):
    found, dataset = objective(small, model, data, *more)
    assert type(found.loss).__name__ == loss
    if from_logits is not None:
        assert found.loss.get_config()["from_logits"] is from_logits
        assert found.threshold == (0.0 if from_logits else 0.5)
    if metric is not None:
        assert found.metric == metric
    net = keras.models.load_model(small / f"{model}.keras")
    net.compile("sgd", found.loss, metrics=found.metrics())
    outputs = net.predict(dataset.x_test, verbose=0)
    expected = net.evaluate(dataset.x_test, dataset.y_test, verbose=0)[1]
    assert found.measure(outputs, dataset.y_test) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "data", "more", "said"),
    [
        ("out2", "ten", [], "has 2 outputs, and data set 'ten' has 10 classes"),
        ("out1", "ten", [], "has 1 outputs"),
        ("out2", "several", [], "has 3 decisions"),
        ("out2", "values", [], "has 1 values"),
        ("sigmoid", "values", ["--metric=accuracy"], "--metric=accuracy does not go with"),
        ("softmax", "bars", ["--metric=mean_squared_error"], "--metric=mean_squared_error"),
        ("softmax", "onehot", ["--loss=binary_crossentropy"], "ends in a softmax"),
    ],
)
def test_what_does_not_fit_is_refused(small, model, data, more, said):
    with pytest.raises(UsageError, match=said):
        objective(small, model, data, *more)


def test_nan_is_not_measured():
    outputs = np.array([[1.0, 2.0], [np.nan, 0.0]])
    with pytest.raises(
        NonFiniteError, match="NaN or infinite values for 1 of 2 examples, the first at index 1"
    ):
        measured(outputs, np.array([0, 1]), "accuracy", "classes", 0.0)


@pytest.mark.parametrize("model", ["out1", "sigmoid"])
def test_evaluate_takes_decisions_at_the_threshold(small, model, capsys):
    arguments = [f"--model={small / model}.keras", f"--data={small / 'text'}.npz"]
    assert main(["evaluate", *arguments]) == 0
    assert (
        f"outputs above {0.5 if model == 'sigmoid' else 0} taken for 1" in capsys.readouterr().out
    )
    assert main(["evaluate", *arguments, "--threshold=1e9"]) == 0
    with np.load(small / "text.npz") as data:
        share = np.mean(data["y_test"] == "left")
    assert f"accuracy {100 * share:.2f} %" in capsys.readouterr().out


def test_evaluate_measures_values(small, capsys):
    arguments = ["--metric=mean_squared_error", f"--data={small / 'values'}.npz"]
    assert main(["evaluate", f"--model={small / 'out1'}.keras", *arguments]) == 0
    with np.load(small / "values.npz") as data:
        net = keras.models.load_model(small / "out1.keras")
        error = net.predict(data["x_test"], verbose=0)[:, 0] - data["y_test"]
    assert f"mean_squared_error {np.mean(error**2):.6g} (32 examples)" in capsys.readouterr().out


def test_classes_of_a_file_and_of_the_data_must_be_the_same():
    command = evaluate.command()
    command.parse(["--model=a.tflite"])
    dataset = load_data(command.flags)
    evaluate._check_labels("a.tflite", ["zero", "one"], dataset)
    with pytest.raises(Exception, match="class 0 is '0', but in"):
        evaluate._check_labels("a.tflite", ["1", "0"], dataset)


@pytest.mark.slow
def test_training_on_values_measures_and_records_them(small, tmp_path, capsys):
    """With the dense network, too, on a single output without an activation."""
    out = tmp_path / "out"
    status = main(
        [
            "train",
            f"--model={small / 'out1'}.keras",
            f"--data={small / 'values'}.npz",
            "--optimizer=adam",
            "--epochs=2",
            "--batch_size=16",
            f"--output_dir={out}",
        ]
    )
    assert status == 0
    assert "loss mean_squared_error" in (printed := capsys.readouterr().out)
    assert "mean_absolute_error: compact 0." in printed
    assert main(["evaluate", f"--model={out}/compact.keras", f"--data={small / 'values'}.npz"]) == 0
    measured_later = capsys.readouterr().out.split()[2]
    assert f"compact {measured_later}" in printed
