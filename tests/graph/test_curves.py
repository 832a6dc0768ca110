"""Curves of sizes: values, and the chords that stand for derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph.curves import Curve, Curves

STAIRS = Curve((16, 17, 32, 33, 48), (1.0, 2.0, 2.0, 3.0, 3.0))
LINE = Curve((1, 64), (3.0, 66.0))


def test_values_are_straight_between_knots_and_constant_outside():
    assert [STAIRS.at(n) for n in (1, 16, 16.5, 20, 33, 99)] == [1.0, 1.0, 1.5, 2.0, 3.0, 3.0]
    curves = Curves([STAIRS, LINE, Curve((5,), (7.0,))])
    for sizes in ([0.0, 0.5, 1.0], [16.5, 2.0, 5.0], [40.0, 64.0, 9.0], [99.0, 99.0, 0.0]):
        expected = [curve.at(n) for curve, n in zip((STAIRS, LINE), sizes, strict=False)] + [7.0]
        np.testing.assert_allclose(curves.exact(np.array(sizes)), expected, rtol=1e-15)
        tensor = curves.tensor(tf.constant(sizes, tf.float64))
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-15)


@pytest.mark.parametrize("size", [1.0, 12.0, 17.0, 24.0, 40.0])
def test_the_derivative_is_the_chord_from_half_the_size(size):
    sizes = tf.Variable([size, size], dtype=tf.float64)
    with tf.GradientTape() as tape:
        values = Curves([STAIRS, LINE]).tensor(sizes)
    expected = [(c.at(size) - c.at(size / 2)) / (size / 2) for c in (STAIRS, LINE)]
    np.testing.assert_allclose(tape.gradient(values, sizes).numpy(), expected, rtol=1e-14)


def test_a_chord_sees_steps_between_which_the_slope_is_zero_and_lines_as_they_are():
    sizes = tf.Variable([24.0, 40.0], dtype=tf.float64)
    with tf.GradientTape() as tape:
        values = Curves([STAIRS, Curve((0, 64), (0.0, 128.0))]).tensor(sizes)
    np.testing.assert_allclose(tape.gradient(values, sizes).numpy(), [1 / 12, 2.0], rtol=1e-14)


def test_nothing_is_saved_where_nothing_is_left():
    sizes = tf.Variable([0.0], dtype=tf.float64)
    with tf.GradientTape() as tape:
        values = Curves([LINE]).tensor(sizes)
    assert (values.numpy(), tape.gradient(values, sizes).numpy()) == (3.0, 0.0)


@pytest.mark.parametrize(
    ("sizes", "values"), [((), ()), ((1, 2), (1.0,)), ((2, 2), (1.0, 1.0)), ((3, 2), (1.0, 2.0))]
)
def test_sizes_must_rise_and_have_values(sizes, values):
    with pytest.raises(InvalidArgumentError, match="rising sizes and a value for each"):
        Curve(sizes, values)
