"""What a model, `compile` and `fit` are warned of or refused for before anything is computed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.errors import DataError, UnsupportedModelError

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.arange(8) % 3
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _network(activation=None, model_class=keras.Model):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(5, activation="relu", name="hidden")(inputs)
    return model_class(inputs, keras.layers.Dense(3, activation=activation, name="head")(x))


def _compiled(network, loss=LOGITS):
    model = kp.KFACModel(network)
    model.compile(kp.KFAC(1e-2), loss, run_eagerly=True)
    return model


class _OwnSteps(keras.Model):
    def train_step(self, data):
        raise AssertionError

    def compute_loss(self, *args, **kwargs):
        raise AssertionError


@pytest.mark.parametrize(
    "wrap", [kp.KFACModel, lambda net: kp.PrunableModel(net, kp.Budget(macs=0.5))]
)
def test_own_steps_that_are_not_called_are_warned_of(wrap):
    network = _network(model_class=_OwnSteps)
    with pytest.warns(UserWarning, match=r"own train_step, compute_loss, which .* does not call"):
        wrap(network)
    wrap(_network())  # without a warning


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        keras.losses.sparse_categorical_crossentropy,
        keras.losses.SparseCategoricalCrossentropy(),
        ["sparse_categorical_crossentropy"],
    ],
)
def test_probabilities_expected_of_logits_are_warned_of(loss):
    with pytest.warns(UserWarning, match=r"'head' \(Dense\) computes without .* from_logits=True"):
        _compiled(_network(), loss)


def test_logits_of_a_nested_model_are_warned_of():
    inputs = keras.Input((4,))
    with pytest.warns(UserWarning, match="from_logits=True"):
        _compiled(keras.Model(inputs, _network()(inputs)), "sparse_categorical_crossentropy")


def test_logits_are_looked_for_by_the_names_of_outputs():
    inputs = keras.Input((4,))
    named = {
        "number": keras.layers.Dense(1, name="number")(inputs),
        "classes": keras.layers.Dense(3, name="head")(inputs),
        "chance": keras.layers.Dense(1, activation="sigmoid", name="chance")(inputs),
    }
    losses = {"number": "mse", "chance": "binary_crossentropy"}
    network = keras.Model(inputs, named)
    _compiled(network, {**losses, "classes": LOGITS})  # without a warning
    with pytest.warns(UserWarning, match="output is what layer 'head'"):
        _compiled(network, {**losses, "classes": "sparse_categorical_crossentropy"})


def test_probabilities_and_other_losses_are_fine():
    _compiled(_network("softmax"), "sparse_categorical_crossentropy")
    _compiled(_network(), "mse")


def test_layers_frozen_after_compile_are_warned_of():
    network = _network()
    model = _compiled(network)
    network.get_layer("hidden").trainable = False
    with pytest.warns(UserWarning, match=r"trained on nevertheless: hidden/bias, hidden/kernel\."):
        model.fit(X, Y, verbose=0)
    model.compile(kp.KFAC(1e-2), LOGITS, run_eagerly=True)
    kernel = network.get_layer("hidden").get_weights()[0]
    model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(network.get_layer("hidden").get_weights()[0], kernel)
    network.get_layer("hidden").trainable = True
    with pytest.warns(UserWarning, match="not trained nevertheless: hidden/bias"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(["cat", "dog"] * 4), "dtype <U3.*np.unique"),
        (np.eye(3)[Y], r"shape \(8, 3\).*argmax"),
        (Y + 1, "from 0 to 2"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        _compiled(_network()).fit(X, labels, verbose=0)


def test_no_examples_are_refused():
    with pytest.raises(DataError, match="no batch in the data"):
        _compiled(_network()).fit(X[:0], Y[:0], verbose=0)


def test_labels_in_a_column_are_taken():
    history = _compiled(_network()).fit(X, Y[:, None], verbose=0)
    assert np.isfinite(history.history["loss"][0])


def test_a_wrapped_network_is_not_wrapped_again():
    wrapped = kp.PrunableModel(_network(), kp.Budget(macs=0.5))
    with pytest.raises(UnsupportedModelError, match="is a PrunableModel, which wraps a network"):
        kp.PrunableModel(wrapped, kp.Budget(macs=0.5))


def test_classes_that_a_data_set_has_beyond_the_outputs_are_named():
    batches = tf.data.Dataset.from_tensor_slices((X, Y + 5)).batch(4)
    with pytest.raises(DataError, match=r"class numbers. Received a label value of \d"):
        _compiled(_network()).fit(batches, shuffle=False, verbose=0)
