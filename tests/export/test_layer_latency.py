"""Tables of measured layer latencies: fit, cache, calibration."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune.errors import ExportError
from tf_kfacprune.export import latency_table, layer_latency
from tf_kfacprune.export.layer_latency import nonnegative_fit
from tf_kfacprune.graph import CostModel, analyze


def network():
    inputs = keras.Input((16,), name="x")
    x = layers.Dense(12, activation="relu", name="fc")(inputs)
    x = layers.Dense(12, activation="relu", name="again")(layers.Dropout(0.1)(x))
    return keras.Model(inputs, layers.Dense(3, name="logits")(x))


def test_the_fit_recovers_coefficients_and_refuses_negative_ones():
    rng = np.random.default_rng(0)
    columns = np.column_stack([np.ones(6), rng.uniform(1, 9, (6, 3))])
    exact = np.array([2.0, 0.5, 0.0, 1.5])
    np.testing.assert_allclose(nonnegative_fit(columns, columns @ exact), exact, atol=1e-9)
    falling = 10.0 - columns[:, 1]
    fitted = nonnegative_fit(columns, falling)
    assert (fitted >= 0).all()
    assert fitted[1] == 0


def test_times_are_measured_once_kept_and_measured_again_on_request(tmp_path, monkeypatch):
    measured = []
    times_of = layer_latency._total_times

    def counted(models):
        measured.append(len(models))
        return times_of(models)

    monkeypatch.setattr(layer_latency, "_total_times", counted)
    model = network()
    table = latency_table(model, cache_dir=tmp_path)
    assert sorted(measured) == [1, 5, 5, 5]  # the model, three distinct layers at five widths
    assert len(table.layers) == 3
    (file,) = tmp_path.iterdir()
    stored = json.loads(file.read_text())
    assert set(table.layers) < set(stored)

    assert latency_table(network(), cache_dir=tmp_path) == table
    assert len(measured) == 4

    # What is stored for the whole model is what the table says of it.
    (total,) = (numbers[1] for name, numbers in stored.items() if name.startswith("model "))
    dense = CostModel(analyze(model), latency_table=table).dense("latency")
    assert dense == pytest.approx(max(total, table.overhead), rel=1e-6)

    monkeypatch.setattr(layer_latency, "_total_times", lambda models: [1.0] + [2.0] * len(models))
    fresh = latency_table(model, refresh=True, cache_dir=tmp_path)
    dense = CostModel(analyze(model), latency_table=fresh).dense("latency")
    assert (fresh.overhead, dense) == (1.0, pytest.approx(2.0))


def test_a_spoilt_file_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_latency, "_total_times", lambda models: [1.0] + [2.0] * len(models))
    latency_table(network(), cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    with pytest.raises(ExportError, match=r"latency_.*not a file of latencies"):
        latency_table(network(), cache_dir=tmp_path)


def test_layers_that_cannot_be_resized_are_timed_at_full_width(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_latency, "_total_times", lambda models: [1.0] + [9.0] * len(models))
    inputs = keras.Input((6, 8), name="x")
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.LSTM(5, name="lstm")(x))
    table = latency_table(model, cache_dir=tmp_path)
    for fixed, per_mac, per_input, per_output in table.layers.values():
        assert per_input == per_output == 0
        assert fixed + per_mac > 0
