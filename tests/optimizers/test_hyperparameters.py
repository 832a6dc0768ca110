"""Damping that follows how steps do on new examples."""

import keras
import pytest
import tensorflow as tf

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers import LevenbergMarquardt


def _adapted(actual, predicted, **settings):
    rule = LevenbergMarquardt(1.0, decay=0.5, every=2, **settings)
    return float(rule.adapted(tf.constant(1.0), tf.constant(actual), tf.constant(predicted)))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(-0.3, 0.25), (-1.5, 0.25), (-0.1, 1.0), (0.1, 4.0), (float("nan"), 4.0), (float("inf"), 4.0)],
)
def test_damping_falls_after_good_steps_and_rises_after_harmful_ones(actual, expected):
    assert _adapted(actual, -1.0) == pytest.approx(expected)


@pytest.mark.parametrize("predicted", [0.0, 1.0, float("nan"), float("-inf")])
def test_damping_stays_where_nothing_was_predicted(predicted):
    assert _adapted(-1.0, predicted) == 1.0


def test_damping_stays_within_its_range():
    assert _adapted(-1.0, -1.0, minimum=0.9) == pytest.approx(0.9)
    assert _adapted(1.0, -1.0, maximum=1.1) == pytest.approx(1.1)


def test_damping_may_begin_in_proportion_to_the_curvature():
    rule = LevenbergMarquardt(None, minimum=1e-3)
    assert float(rule.beginning(tf.constant(0.2))) == pytest.approx(6.0)
    assert float(rule.beginning(tf.constant(1e-6))) == pytest.approx(1e-3)


def test_config_round_trips():
    rule = LevenbergMarquardt(0.5, decay=0.9, every=3, minimum=1e-4, maximum=2.0)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rule))
    assert again.get_config() == rule.get_config()
    assert "decay=0.9" in repr(rule)


@pytest.mark.parametrize(
    "arguments",
    [
        {"initial": 0.0},
        {"decay": 1.0},
        {"every": 0},
        {"minimum": 1.0, "initial": 0.1},
        {"minimum": 1.0, "maximum": 0.5},
        {"maximum": 1e-3, "initial": 0.1},
    ],
    ids=lambda a: next(iter(a)),
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        LevenbergMarquardt(**arguments)
