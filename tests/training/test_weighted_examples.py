"""Weights of examples, of losses, and what a loss must be for K-FAC."""

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = (X[:, :3].sum(axis=1) > 0).astype("int32") + (X[:, 3] > 1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
FIXED = {"learning_rate": 0.05, "factor_every": 1, "inverse_every": 2, "kl_clip": None}
AUTO = {**FIXED, "learning_rate": "auto"}


def _trained(settings, sample_weight=None, class_weight=None, **compiled):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6,))
    hidden = L.Dense(8, activation="tanh")(inputs)
    model = kp.KFACModel(keras.Model(inputs, L.Dense(3)(hidden)), seed=0)
    # Compiled steps take seconds to trace, and are compared with these in test_kfac_model.py.
    model.compile(kp.KFAC(**settings), LOSS, run_eagerly=True, **compiled)
    weights = {"sample_weight": sample_weight, "class_weight": class_weight}
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0, **weights)
    return model.net.get_weights()


@pytest.mark.parametrize("settings", [FIXED, AUTO], ids=["fixed", "auto"])
def test_equal_weights_of_examples_or_classes_are_a_weight_of_the_loss(settings):
    expected = _trained(settings, loss_weights=[9.0])
    of_examples = {"sample_weight": np.full(64, 9.0, "float32")}
    of_classes = {"class_weight": dict.fromkeys(range(3), 9.0)}
    for given in (of_examples, of_classes):
        for weight, wanted in zip(_trained(settings, **given), expected, strict=True):
            np.testing.assert_allclose(weight, wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_losses_that_are_no_means_are_refused(reduction):
    model = kp.KFACModel(keras.Sequential([keras.Input((6,)), L.Dense(3)]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    with pytest.raises(InvalidArgumentError, match=f"reduction='{reduction}'"):
        model.compile(kp.KFAC(), loss)
    model.compile("adam", loss)


def test_the_only_loss_may_come_in_a_list(recwarn):
    inputs = keras.Input((6,))
    model = kp.KFACModel(keras.Model(inputs, L.Dense(3)(inputs)))
    model.compile(kp.KFAC("auto"), [LOSS])
    model.fit(X, Y, batch_size=16, verbose=0)
    assert not [w for w in recwarn if "empirical" in str(w.message)]
