"""What is said when a budget cannot be met or counted."""

from __future__ import annotations

import keras
import pytest
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.errors import BudgetError
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import analyze
from tf_kfacprune.graph.reachability import check_countable, uncounted_layers, what_stays


@pytest.fixture(scope="module")
def gated():
    inputs = keras.Input((6,), name="features")
    x = layers.Dense(8, name="free")(inputs)
    x = layers.Dense(50, name="large")(x)
    for k in range(7):
        x = layers.Softmax()(layers.Dense(4 + k, name=f"frozen{k}")(x))
    return GatedNetwork(insert_gates(keras.Model(inputs, layers.Dense(3, name="out")(x))))


def test_what_stays_leaves_inputs_out_and_is_bounded_with_the_largest_first(gated):
    text = what_stays(gated.channels, gated.cost, "macs")
    assert "features" not in text
    assert text.startswith("frozen6 (10): activation mixes channels")
    assert text.endswith("; and 3 more")
    assert text.count("activation mixes channels") == 5


def opaque_model():
    inputs = keras.Input((6,))
    x = layers.Dense(8, name="first")(inputs)
    x = kp.keep_opaque(keras.layers.EinsumDense("ab,bc->ac", (5,), name="plain"))(x)
    own = kp.keep_opaque(_Own(name="own"))
    return keras.Model(inputs, layers.Dense(2)(own(x)))


@pytest.mark.parametrize("kind", ["model in TimeDistributed", "several cells"])
def test_what_a_wrapper_holds_is_not_taken_for_free(kind):
    inputs = keras.Input((4, 6))
    if kind == "several cells":
        wrapper = layers.RNN([layers.LSTMCell(5), layers.LSTMCell(7)], name="wrapper")
        x, reason = wrapper(inputs), "around several cells"
    else:
        inner = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(7)])
        x = layers.TimeDistributed(inner, name="wrapper")(inputs)
        x, reason = layers.Flatten()(x), "wrapper around a layer or model without a channel rule"
    x = layers.Dense(8, name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(2, name="logits")(x))
    channels = analyze(model)
    (wrapper,) = uncounted_layers(channels, "macs")
    assert (wrapper.path, reason in wrapper.reason) == ("wrapper", True)
    with pytest.raises(BudgetError, match="'wrapper'"):
        kp.PrunableModel(model, kp.Budget(macs=0.9))
    (listed,) = kp.inspect(model).opaque
    assert listed.layer == "wrapper"


class _Own(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), name="w")
        self.built = True

    def call(self, x):
        return keras.ops.matmul(x, self.w)


def test_a_budget_in_what_is_not_counted_is_refused():
    channels = analyze(opaque_model())
    (own,) = uncounted_layers(channels, "macs")  # a layer with a rule is counted all the same
    assert own.path == "own"
    check_countable(channels, ["params", "bytes"], "mine")
    with pytest.raises(BudgetError, match="'own': kept opaque by the caller"):
        check_countable(channels, ["params", "macs"], "mine")
