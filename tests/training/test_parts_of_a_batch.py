"""What looks at a part of a batch gets the same part of everything: x, y, weights, masks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_kfacprune as kp
from tf_kfacprune.curvature import Batch, CurvatureEstimator
from tf_kfacprune.errors import InvalidArgumentError

L = keras.layers
to_numpy = keras.ops.convert_to_numpy
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
X[:, 0] = np.arange(32)  # a number for each example
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class _Numbered(keras.losses.Loss):
    """Squared error that notes whose labels and predictions it was shown."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def call(self, y_true, y_pred):
        self.seen.append((to_numpy(y_true)[:, 0], to_numpy(y_pred)[:, 0]))
        return tf.reduce_mean(tf.square(y_true[:, 1:] - y_pred[:, 1:]), axis=-1)


def _numbered_network():
    """Its first output is the number of the example, whatever its weights are."""
    inputs = keras.Input((6,))
    x = L.Dense(8, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, L.Concatenate()([inputs[:, :1], L.Dense(2, name="last")(x)]))


USERS = {
    "optimizer": (kp.KFAC(factor_every=1, batch_fraction=0.25), None, None),
    "quadratic model": (kp.KFAC("auto", damping=0.1, batch_fraction=0.25), None, None),
    "score": (keras.optimizers.SGD(0.01), kp.KFACSaliency(every=1, curvature_every=1), None),
    "penalty": (keras.optimizers.SGD(0.01), None, kp.SpectralRadius(1e-4, every=1)),
}


@pytest.mark.filterwarnings("ignore:.*fall back on the empirical Fisher")
@pytest.mark.parametrize("user", USERS)
def test_a_loss_sees_labels_and_predictions_of_the_same_examples(user):
    optimizer, policy, curvature = USERS[user]
    budget = None if policy is None else kp.Budget(macs=0.5)
    arguments = {} if policy is None else {"policy": policy, "phases": kp.Phases(0.0, 0.9)}
    seen = []
    model = kp.PrunableModel(_numbered_network(), budget, curvature, seed=0, **arguments)
    model.compile(optimizer, _Numbered(seen), run_eagerly=True)
    y = np.c_[X[:, 0], RNG.normal(size=(32, 2))].astype("float32")
    if policy is not None:
        model.plan_phases(10)
    for _ in range(2):
        model.train_on_batch(X, y, sample_weight=np.ones(32, "float32"))
    # That a loss averages over its outputs is measured on two examples of random numbers.
    seen = [pair for pair in seen if len(pair[0]) > 2]
    sizes = {len(labels) for labels, _ in seen}
    assert sizes == {16 if user == "penalty" else 8, 32}  # the penalty sees at least 16
    for labels, predictions in seen:
        np.testing.assert_array_equal(labels, predictions)


@pytest.mark.parametrize("normalizes", [True, False])
def test_parts_that_are_normalized_by_their_statistics_have_sixteen_examples(normalizes):
    inputs = keras.Input((6,))
    norm = L.BatchNormalization()
    estimator = CurvatureEstimator(keras.Model(inputs, L.Dense(2)(norm(inputs))), None)
    norm.trainable = normalizes
    sizes = [int(estimator.part_of(Batch(np.zeros((n, 6))), 0.25).size) for n in (4, 32, 100)]
    assert sizes == ([4, 16, 25] if normalizes else [1, 8, 25])


@pytest.mark.parametrize("learning_rate", [0.1, "auto"])
def test_curvature_in_front_of_a_normalization_is_seen_with_small_batches(learning_rate):
    """The statistics of one example, or of two, leave nothing of what comes before them."""
    inputs = keras.Input((6,))
    x = L.BatchNormalization()(L.Dense(4, use_bias=False)(inputs))
    model = kp.KFACModel(keras.Model(inputs, L.Dense(2)(L.Activation("tanh")(x))), seed=0)
    optimizer = kp.KFAC(learning_rate, labels="exact")
    model.compile(optimizer, "mse", run_eagerly=True)
    y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
    model.train_on_batch(X[:8], y)
    first = optimizer._curvature.states[0]
    assert np.trace(np.array(first.g.averages[0])) > 1e-3


def _fixed_size(y_true, y_pred):
    return tf.reduce_mean(tf.square(tf.reshape(y_pred - y_true, (16, 2))), axis=-1)


@pytest.mark.filterwarnings("ignore:.*fall back on the empirical Fisher")
def test_a_loss_for_one_batch_size_is_told_of_the_remedy_which_works():
    def model_with(**optimizer):
        network = keras.Sequential([keras.Input((6,)), L.Dense(4, "tanh"), L.Dense(2)])
        policy = kp.KFACSaliency(batch_fraction=1)
        model = kp.PrunableModel(network, kp.Budget(macs=0.5), policy=policy, seed=0)
        model.compile(kp.KFAC(1e-2, **optimizer), _fixed_size, run_eagerly=True)
        return model

    y = X[:, 1:3]
    with pytest.raises(InvalidArgumentError, match=r"_fixed_size.*batch_fraction=1"):
        model_with().fit(X, y, batch_size=16, verbose=0)
    history = model_with(batch_fraction=1).fit(X, y, batch_size=16, epochs=4, verbose=0).history
    assert history["macs"][-1] <= 0.5


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("loss", ["sparse", "two outputs", "none known"])
@pytest.mark.filterwarnings("ignore:.*fall back on the empirical Fisher")
def test_tiny_batches_prune_to_the_budget(size, loss):
    inputs = keras.Input((6,))
    hidden = L.Dense(8, "tanh")(inputs)
    y, given = (X[:, 1] > 0).astype("int32"), SPARSE
    outputs = L.Dense(2, name="a")(hidden)
    if loss == "two outputs":
        outputs, given = [outputs, L.Dense(1, name="b")(hidden)], [SPARSE, "mse"]
    if loss == "none known":
        given, y = "huber", X[:, 1:3]
    model = kp.PrunableModel(keras.Model(inputs, outputs), kp.Budget(macs=0.5), seed=0)
    model.compile(kp.KFAC(1e-2), given, run_eagerly=True)
    model.plan_phases(8)
    for k in range(8):
        part = slice(3 * k, 3 * k + size)
        labels = [y[part], X[part, 2:3]] if loss == "two outputs" else y[part]
        logs = model.train_on_batch(X[part], labels, return_dict=True)
    assert logs["macs"] <= 0.5
    assert int(logs["skipped_steps"]) == 0
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("weight", [100.0, 0.01])
def test_weights_of_examples_are_in_both_terms_of_a_score(weight):
    """`b = -g + (z - 1/2) F` is as many times as large."""
    found = []
    for w in (1.0, weight):
        keras.utils.set_random_seed(0)
        network = keras.Sequential([keras.Input((6,)), L.Dense(8, "tanh"), L.Dense(3)])
        policy = kp.KFACSaliency(every=1000, labels="exact", batch_fraction=1)
        phases = kp.Phases(0.0, 0.9)
        model = kp.PrunableModel(network, kp.Budget(macs=0.5), policy=policy, phases=phases, seed=0)
        model.compile(keras.optimizers.SGD(0.0), SPARSE, run_eagerly=True)
        model.plan_phases(10)
        y = (X[:, 1] > 0).astype("int32")
        for _ in range(2):
            model.train_on_batch(X / 32, y, sample_weight=np.full(32, w, "float32"))
        criterion = model.controller.policy.criterion
        found.append([to_numpy(m.value()) for m in (criterion.curvature, criterion.worth)])
    for one, other in zip(*found, strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(other, weight * one, rtol=1e-3, atol=1e-4 * weight * one.max())


def test_padding_has_no_curvature():
    """Factors and scores of padded sentences are those of the same without padding."""
    tokens = RNG.integers(1, 9, size=(16, 3))
    found = []
    for length in (3, 7):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((length,), dtype="int32")
        x = L.Embedding(9, 5, mask_zero=True, embeddings_initializer="normal")(inputs)
        x = L.Dense(4, "tanh", name="hidden")(x)
        network = keras.Model(inputs, L.Dense(2, name="last")(x))
        policy = kp.KFACSaliency(every=1000, labels="data", batch_fraction=1)
        phases = kp.Phases(0.0, 0.9)
        model = kp.PrunableModel(network, kp.Budget(macs=0.8), policy=policy, phases=phases, seed=0)
        optimizer = kp.KFAC(1e-2, factor_every=1, labels="data", batch_fraction=1)
        model.compile(optimizer, SPARSE, run_eagerly=True)
        model.plan_phases(10)
        x = np.zeros((16, length), "int32")
        x[:, :3] = tokens
        model.train_on_batch(x, x % 2)
        states = {s.name: s for s in optimizer._curvature.states}
        found.append(
            [
                *(
                    to_numpy(f.averages[0])
                    for n in ("hidden", "last")
                    for f in (states[n].a, states[n].g)
                ),
                to_numpy(model.controller.policy.criterion.curvature.value()),
                *(to_numpy(w) for w in model.net.trainable_variables),
            ]
        )
    for short, padded in zip(*found, strict=True):
        np.testing.assert_allclose(padded, short, rtol=1e-3, atol=1e-5)


def test_metrics_of_several_outputs_are_not_counted_by_further_passes():
    """The losses of single outputs in `history` are those of plain Keras."""
    histories = []
    y = [(X[:, 1] > 0).astype("int32"), X[:, 2:3]]
    for wrap in (lambda net: net, lambda net: kp.KFACModel(net, seed=0)):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        hidden = L.Dense(8, "tanh")(inputs)
        net = keras.Model(inputs, [L.Dense(2, name="a")(hidden), L.Dense(1, name="b")(hidden)])
        model = wrap(net)
        optimizer = keras.optimizers.SGD(0.0)
        if model is not net:
            optimizer = kp.KFAC(1e-12, factor_every=1)
        metrics = [["accuracy"], ["mae"]]
        model.compile(optimizer, [SPARSE, "mse"], metrics=metrics, run_eagerly=True)
        histories.append(model.fit(X, y, batch_size=8, shuffle=False, verbose=0).history)
    plain, ours = histories
    assert set(ours) == {*plain, "skipped_steps"}
    for name, values in plain.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-5, err_msg=name)
