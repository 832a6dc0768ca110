"""Latency: ratios to a baseline of files that run in turn (no claim about absolute times)."""

from __future__ import annotations

import keras
import pytest

from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export import latency, tflite


def net(width):
    x = keras.Input((64,), name="x")
    h = keras.layers.Dense(width, activation="relu")(x)
    return keras.Model(x, keras.layers.Dense(10)(h))


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    file = tflite(net(8), tmp_path_factory.mktemp("t") / "small.tflite", verify=False)
    return latency({"large": net(2000), "small": file}, blocks=5, runs=10)


def test_ratios_are_relative_to_the_first_model(timed):
    assert timed.baseline == "large"
    assert timed.ratios["large"] == 1.0
    assert set(timed.microseconds) == {"large", "small"}


def test_a_net_with_a_250th_of_the_weights_is_faster(timed):
    assert 0.0 < timed.ratios["small"] < 1.0
    assert 0.0 < timed.microseconds["small"] < timed.microseconds["large"]


def test_text_names_every_model_and_the_baseline(timed):
    assert str(timed).count("x large") == 2
    assert "small: " in str(timed)


@pytest.mark.parametrize("argument", ["threads", "batch_size", "blocks", "runs"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_counts_must_be_positive_integers(argument, value):
    with pytest.raises(InvalidArgumentError, match=f"{argument} must be a positive integer"):
        latency({"a": "a.tflite"}, **{argument: value})


def test_unknown_baseline_missing_file_and_other_objects_are_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"one of \['a'\].*'b'"):
        latency({"a": "a.tflite"}, baseline="b")
    with pytest.raises(ExportError, match=r"a\.tflite: no such file"):
        latency({"a": tmp_path / "a.tflite"})
    with pytest.raises(InvalidArgumentError, match=r"models\['a'\].*int"):
        latency({"a": 3})
    with pytest.raises(InvalidArgumentError, match="at least one"):
        latency({})
