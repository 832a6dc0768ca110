"""The report measures both models, and refuses models that do not belong together."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.compaction import compact
from tf_kfacprune.curvature.diagnostics import hessian_spectrum
from tf_kfacprune.errors import DataError, ExportError, InvalidArgumentError, NonFiniteError
from tf_kfacprune.gates import GateSource
from tf_kfacprune.gates.insertion import insert_gates
from tf_kfacprune.reporting import accuracy, report
from tf_kfacprune.reporting.figures import flatness_of, measures, tflite_size

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype("float32")
Y = RNG.integers(0, 3, 40)


@pytest.fixture(scope="module")
def models():
    keras.utils.set_random_seed(0)
    dense = keras.Sequential(
        [
            keras.Input((6,), name="x"),
            keras.layers.Dense(20, activation="relu", name="fc"),
            keras.layers.Dense(3, name="out"),
        ]
    )
    gated = insert_gates(dense)
    (bank,) = [layer for layer in gated.layers if isinstance(layer, GateSource)]
    closed = np.where(np.arange(20) < 15, -20.0, 20.0)
    bank.parameters.assign(closed)
    bank.phase.assign(2)
    bank.keep.assign((closed > 0).astype("float32"))
    return dense, gated, compact(gated)


def test_report_counts_and_measures_both_models(models):
    dense, gated, small = models
    comparison = report(gated, small, dense=dense, data=(X, Y))
    assert comparison.dense.neurons["fc"] == 20
    assert comparison.compact.neurons["fc"] == 5
    assert comparison.kept["fc"] == list(range(15, 20))
    assert comparison.dense.params == dense.count_params() == 20 * 7 + 3 * 21
    assert comparison.compact.params == small.count_params() == 5 * 7 + 3 * 6
    assert (comparison.dense.macs, comparison.compact.macs) == (20 * 9, 5 * 9)
    assert comparison.dense.accuracy == np.mean(dense.predict(X, verbose=0).argmax(1) == Y)
    assert comparison.compact.tflite.raw < comparison.dense.tflite.raw
    assert comparison.latency_ratio > 0.0


def test_without_the_dense_model_only_the_compact_one_is_measured(models):
    _, gated, small = models
    comparison = report(gated, small, data=(X, Y), files=False)
    assert comparison.dense.accuracy is None
    assert comparison.compact.accuracy is not None
    assert comparison.compact.tflite is None
    assert comparison.latency_ratio is None


def test_models_that_do_not_belong_together_are_refused(models):
    dense, gated, _ = models
    with pytest.raises(InvalidArgumentError, match="Pass the model"):
        report(gated, dense)


def test_data_must_be_a_pair(models):
    _, gated, small = models
    with pytest.raises(InvalidArgumentError, match=r"pair \(x, y\)"):
        report(gated, small, data=X)


def test_data_may_be_a_dataset_of_batches(models):
    _, gated, small = models
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(7)
    assert report(gated, small, data=dataset, files=False).compact.accuracy == accuracy(small, X, Y)
    with pytest.raises(DataError, match="no end"):
        report(gated, small, data=dataset.repeat())
    with pytest.raises(DataError, match="no batch"):
        report(gated, small, data=dataset.take(0))


def test_accuracy_counts_the_largest_output(models):
    dense, _, _ = models
    right = dense.predict(X, verbose=0).argmax(axis=1)
    assert accuracy(dense, X, right) == 1.0
    assert accuracy(dense, X, right[:, None]) == 1.0
    right[:10] = (right[:10] + 1) % 3
    assert accuracy(dense, X, right) == 0.75


def test_accuracy_refuses_what_is_not_a_classifier(models):
    single = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    with pytest.raises(InvalidArgumentError, match="at least 2 classes"):
        accuracy(single, X, Y)
    with pytest.raises(DataError, match="39 labels for 40 inputs"):
        accuracy(models[0], X, Y[:39])


def test_what_is_no_classifier_is_measured_by_what_it_was_compiled_with():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(20, activation="relu", name="fc")(inputs)
    outputs = {
        "is_large": keras.layers.Dense(1, activation="sigmoid", name="is_large")(x),
        "value": keras.layers.Dense(2, name="value")(x),
    }
    targets = {"is_large": (X[:, :1] > 0).astype("float32"), "value": X[:, 1:3]}
    losses = {"is_large": "binary_crossentropy", "value": "mse"}
    pm = kp.PrunableModel(keras.Model(inputs, outputs), kp.Budget(macs=0.5), seed=0)
    pm.compile(loss=losses, metrics={"value": ["mae"]})
    pm.fit(X, targets, batch_size=8, epochs=4, verbose=0)
    small = compact(pm)
    bare = keras.models.clone_model(small)
    with pytest.raises(InvalidArgumentError, match="Compile it with the loss"):
        measures(bare, X, targets, bare)
    # By what the pruned model was compiled with, as the compact one is not.
    comparison = report(pm, small, data=(X, targets), files=False)
    assert not small.compiled
    found = small.predict(X, verbose=0)
    p, is_large = found["is_large"], targets["is_large"]
    entropy = -np.mean(is_large * np.log(p) + (1 - is_large) * np.log(1 - p))
    errors = found["value"] - targets["value"]
    measured = comparison.compact.measures
    assert measured["loss"] == pytest.approx(entropy + np.mean(errors**2), rel=1e-4)
    assert measured["value_mae"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-4)
    assert comparison.compact.accuracy is None
    assert "value_mae" in str(comparison)


@pytest.mark.parametrize("count", [600, 547])
def test_losses_of_single_outputs_are_means_over_examples(count):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,))
    heads = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b")}
    model = keras.Model(inputs, heads)
    model.compile(loss={"a": "mse", "b": "mse"})
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 2)).astype("float32")
    y = {"a": rng.normal(size=(count, 1)), "b": np.linspace(0, 9, count)[:, None] ** 2}
    found = measures(model, x, y, model)["measures"]
    outputs = model.predict(x, verbose=0)
    for name in ("a", "b"):
        expected = np.mean((outputs[name] - y[name]) ** 2)
        assert found[f"{name}_loss"] == pytest.approx(expected, rel=1e-4)


def _two_outputs(loss, **metrics):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    model.compile(loss=loss, **metrics)
    return model


def _gaussian(y, outputs):
    """Negative log-likelihood of a mean and a logarithm of a variance, without constants."""
    mean, log_variance = outputs[:, 0], outputs[:, 1]
    return 0.5 * (log_variance + (y[:, 0] - mean) ** 2 / keras.ops.exp(log_variance))


def test_two_outputs_that_are_no_classes_are_measured_by_their_loss():
    model, y = _two_outputs(_gaussian), X[:, :1]
    found = measures(model, X, y, model)
    mean, log_variance = model.predict(X, verbose=0).T
    expected = np.mean(0.5 * (log_variance + (y[:, 0] - mean) ** 2 / np.exp(log_variance)))
    assert found["measures"]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        keras.losses.sparse_categorical_crossentropy,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ],
    ids=["name", "function", "object"],
)
def test_losses_of_class_numbers_are_measured_by_accuracy(loss):
    model = _two_outputs(loss)
    expected = np.mean(model.predict(X, verbose=0).argmax(1) == (Y > 0))
    assert measures(model, X, (Y > 0).astype(int), model) == {"accuracy": expected}


def test_classes_that_the_loss_ignores_are_measured_as_it_does():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model, y = _two_outputs(loss), np.where(Y == 2, -1, Y)
    found = measures(model, X, y, model)["measures"]["loss"]
    logits = model.predict(X, verbose=0)[y >= 0]
    terms = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), y[y >= 0]]
    assert found == pytest.approx(terms.mean(), rel=1e-5)


def test_what_is_no_class_number_or_no_number_is_refused(models):
    dense, _, small = models
    with pytest.raises(DataError, match="class numbers"):
        accuracy(dense, X, X[:, 0])
    with pytest.raises(DataError, match="class numbers"):
        accuracy(dense, X, np.array(["a", "b"] * 20))
    with pytest.raises(DataError, match=r"\[39, 40\]"):
        measures(dense, X, Y[:39], small)
    with pytest.raises(DataError, match="at least one"):
        measures(dense, X[:0], Y[:0], small)
    broken = X.copy()
    broken[3] = np.nan
    with pytest.raises(NonFiniteError, match="NaN for 1 of 40"):
        accuracy(_two_outputs("mse"), broken, Y)


def test_tflite_size_holds_the_weights_once(models):
    dense, _, small = models
    assert tflite_size(dense).raw - tflite_size(small).raw == pytest.approx(
        4 * (dense.count_params() - small.count_params()), abs=200
    )


def test_the_page_is_written_whole_and_shows_the_run(tmp_path):
    """A whole run: what `fit` logged comes to the page without being handed over."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(20, activation="relu", name="fc"),
            keras.layers.Dense(3, name="out"),
        ]
    )
    pm = kp.PrunableModel(net, kp.Budget(macs=0.5), policy="magnitude", seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pm.compile("adam", loss)
    pm.fit(X, Y, batch_size=8, epochs=4, verbose=0)
    small = compact(pm)
    path = tmp_path / "report.html"
    comparison = report(pm, small, data=(X, Y), files=False, flatness=loss, html=path)
    exact = hessian_spectrum(small, (X, Y), loss).top
    assert comparison.compact.flatness.top == pytest.approx(exact, rel=0.02)
    assert comparison.compact.flatness.num_examples == len(X)
    text = path.read_text()
    for shown in (
        "Pruning began after 0.2 epochs and ended on the budget after 1 epoch",
        f"{comparison.compact.neurons['fc']} of 20",
        "Budget(macs=0.5)",
        "Adam",
    ):
        assert shown in text
    with pytest.raises(ExportError, match="already exists"):
        report(pm, small, files=False, html=path)
    report(pm, small, files=False, html=path, overwrite=True)
    assert path.read_text() != text


def test_a_page_that_cannot_be_made_leaves_nothing(models, tmp_path):
    _, gated, small = models
    with pytest.raises(InvalidArgumentError, match=r"\.html or \.htm.*report\.pdf"):
        report(gated, small, html=tmp_path / "report.pdf")
    with pytest.raises(InvalidArgumentError, match="flatness needs data"):
        report(gated, small, flatness="mse")
    with pytest.raises(InvalidArgumentError, match="Pass the model"):
        report(gated, models[0], html=tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_flatness_that_cannot_be_computed_has_a_reason():
    class OwnUpSampling(keras.layers.UpSampling2D):
        def call(self, x):
            return super().call(x)

    image = keras.Input((4, 4, 1))
    x = OwnUpSampling(interpolation="bilinear", name="up")(image)
    model = keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    found = flatness_of(model, np.ones((3, 4, 4, 1), "float32"), np.zeros((3, 2)), "mse")
    assert found.top is None
    assert "'up'" in found.reason


def test_a_model_that_no_file_can_hold_is_reported_without_one(models, monkeypatch):
    _, gated, small = models

    def fails(model):
        raise ExportError("The TFLite converter cannot convert it.\nIts log")

    monkeypatch.setattr("tf_kfacprune.reporting.pruning_report.tflite_size", fails)
    with pytest.warns(UserWarning, match="no .tflite bytes of .* cannot convert it.$"):
        comparison = report(gated, small)
    assert comparison.compact.tflite is None
    assert comparison.compact.params == small.count_params()


def test_flatness_of_a_model_with_named_inputs():
    keras.utils.set_random_seed(0)
    inputs = {name: keras.Input((6,), name=name) for name in ("a", "b")}
    network = keras.Model(inputs, keras.layers.Dense(3)(inputs["a"] + inputs["b"]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = flatness_of(network, {"a": X, "b": X}, Y, loss)
    assert found.reason is None
    assert found.num_examples == len(Y)
    exact = hessian_spectrum(network, ({"a": X, "b": X}, Y), loss).top
    assert found.top == pytest.approx(exact, rel=0.05)
