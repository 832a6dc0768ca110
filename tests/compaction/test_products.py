"""Products of two tensors, of a tensor with itself and with constants: compact equals gated."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_kfacprune.graph import CostModel, analyze, reasons


def two_towers(left, right, combine):
    """Dense layers on two sequences of different lengths, and what combines them."""
    a, b = keras.Input((7, 5), name="a"), keras.Input((4, 6), name="b")
    x, y = layers.Dense(left, name="left")(a), layers.Dense(right, name="right")(b)
    z = combine([x, y]) if isinstance(combine, layers.Layer) else combine(x, y)
    return keras.Model([a, b], layers.Dense(2, name="head")(z))


def positions(x, y):
    return layers.Dot(axes=1)([x[:, :4], y])


def two_vectors(normalize):
    a, b = keras.Input((5,)), keras.Input((6,))
    x, y = layers.Dense(4, name="left")(a), layers.Dense(4, name="right")(b)
    return keras.Model([a, b], layers.Dot(axes=1, normalize=normalize)([x, y]))


def itself(product):
    inputs = keras.Input((7, 5))
    x = layers.Dense(9, activation="tanh", name="left")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="head")(product(x)))


CASES = {
    "dot of channels": (lambda: two_towers(6, 6, layers.Dot(axes=2)), {"left"}),
    "dot of positions": (lambda: two_towers(6, 5, positions), {"right"}),
    "dot of channels and positions": (
        lambda: two_towers(4, 5, lambda x, y: layers.Dot(axes=(-1, 1))([x, y])),
        {"right"},
    ),
    "dot of vectors": (lambda: two_vectors(False), {"left"}),
    "cosines": (lambda: two_towers(6, 6, layers.Dot(axes=-1, normalize=True)), {"left"}),
    "cosine of vectors": (lambda: two_vectors(True), {"left"}),
    "cosines with itself": (
        lambda: itself(lambda x: layers.Dot(axes=2, normalize=True)([x, x])),
        {"left"},
    ),
    "dot with itself": (lambda: itself(lambda x: layers.Dot(axes=2)([x, x])), {"left"}),
    "einsum with itself": (lambda: itself(lambda x: ops.einsum("bqc,bkc->bqk", x, x)), {"left"}),
    "squares": (lambda: itself(lambda x: ops.einsum("btc,btc->bt", x, x)), {"left"}),
}


@pytest.mark.parametrize("case", CASES)
def test_compact_equals_gated(case, assert_exact):
    build, prunable = CASES[case]
    model = build()
    assert {group.name for group in analyze(model).groups} == prunable
    assert_exact(model)


def test_dot_couples_what_it_sums_over_and_passes_the_rest():
    channels = analyze(two_towers(6, 6, layers.Dot(axes=2, name="dot")))
    (group,) = channels.groups
    assert (group.size, group.producers, group.consumers) == (6, ("left", "right"), ("dot",))
    passed = analyze(two_towers(6, 5, positions))
    assert {g.name: g.consumers for g in passed.groups} == {"right": ("head",)}


def test_products_of_data_with_data_cost_nothing():
    cost = CostModel(analyze(two_towers(6, 6, layers.Dot(axes=2))))
    assert cost.macs_dense == 7 * 5 * 6 + 4 * 6 * 6 + 7 * 4 * 2


def test_channels_summed_with_a_constant_are_frozen():
    constant = np.ones((9, 3), "float32")
    channels = analyze(itself(lambda x: ops.matmul(x, constant)))
    assert {f.reason for f in channels.frozen if f.layer == "left"} == {reasons.REDUCED}
