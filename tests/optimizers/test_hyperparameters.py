"""Damping that follows how steps do on new examples."""

import keras
import pytest
import tensorflow as tf

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.optimizers import LevenbergMarquardt


def _adapted(actual, predicted, first=1.0, steps=2, **settings):
    rule = LevenbergMarquardt(1.0, decay=0.5, every=2, **settings)
    first, steps = tf.constant(first), tf.constant(steps)
    damping, is_rejected = rule.adapted(
        tf.constant(1.0), tf.constant(actual), tf.constant(predicted), first=first, steps=steps
    )
    return float(damping), bool(is_rejected)


@pytest.mark.parametrize(
    ("actual", "expected"), [(-0.3, 0.25), (-1.5, 0.25), (-0.1, 1.0), (0.1, 4.0), (0.9, 4.0)]
)
def test_damping_falls_after_good_steps_and_rises_after_harmful_ones(actual, expected):
    assert _adapted(actual, -1.0) == (pytest.approx(expected), False)


@pytest.mark.parametrize("actual", [1.1, float("inf"), float("nan")])
def test_a_step_that_did_more_harm_than_it_promised_good_is_rejected(actual):
    assert _adapted(actual, -1.0) == (pytest.approx(3.0), True)


@pytest.mark.parametrize("predicted", [0.0, 1.0, float("nan"), float("-inf")])
def test_damping_stays_where_nothing_was_predicted(predicted):
    for actual in (-1.0, 1.0, float("nan")):
        assert _adapted(actual, predicted) == (1.0, False)


def test_damping_moves_with_the_steps_since_the_last_comparison():
    assert _adapted(-1.0, -1.0, steps=1)[0] == pytest.approx(0.5)
    assert _adapted(-1.0, -1.0, steps=5)[0] == pytest.approx(0.5**5)


def test_every_watched_step_is_judged_and_later_one_in_a_period():
    rule = LevenbergMarquardt(every=4)
    watched = tf.constant(6)
    judged = [step for step in range(14) if bool(rule.is_judged(tf.constant(step), watched))]
    assert judged == [1, 2, 3, 4, 5, 6, 8, 12]


def test_damping_stays_within_its_range():
    assert _adapted(-1.0, -1.0, minimum=0.9)[0] == pytest.approx(0.9)
    assert _adapted(0.5, -1.0, maximum=1.1)[0] == pytest.approx(1.1)
    assert _adapted(0.5, -1.0, first=0.2)[0] == pytest.approx(2.0)


def test_damping_may_begin_in_proportion_to_the_curvature():
    rule = LevenbergMarquardt(None, minimum=1e-3, maximum=0.5)
    assert float(rule.beginning(tf.constant(0.2))) == pytest.approx(0.06)
    assert float(rule.beginning(tf.constant(1e-6))) == pytest.approx(1e-3)
    assert float(rule.beginning(tf.constant(9.0))) == pytest.approx(0.5)


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
