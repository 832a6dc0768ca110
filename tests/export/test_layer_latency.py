"""Tables of layer latencies: what is timed, how it is kept, and what is predicted from it.

Times are those of a made-up processor, which counts tiles in the file that it is given: what is
predicted can be told exactly.
"""

from __future__ import annotations

import json
import math

import keras
import numpy as np
import pytest
from keras import layers

import tf_kfacprune as kp
from tf_kfacprune.errors import ExportError, InvalidArgumentError
from tf_kfacprune.export import latency_table, layer_latency
from tf_kfacprune.export.conversion import convert
from tf_kfacprune.export.file_parts import file_parts
from tf_kfacprune.export.layer_latency import _converted
from tf_kfacprune.export.model_graph import read_graph
from tf_kfacprune.export.serving import Signature
from tf_kfacprune.graph import CostModel, analyze

OVERHEAD = 0.5


def made_up_time(content):
    """Microseconds of a file: a tile of 16 channels per pixel and input channel, and so on."""
    graph, time = read_graph(content), OVERHEAD
    faster = 4.0 if any(tensor.dtype == "int8" for tensor in graph.tensors) else 1.0
    for step in graph.operations:
        written = graph.tensors[step.outputs[0]].shape or (1,)
        positions, created = math.prod(written[:-1]), written[-1]
        tiles = -(-created // 16)
        if step.operator in ("CONV_2D", "FULLY_CONNECTED"):
            read = graph.tensors[step.inputs[1]].shape[-1]
            is_single = step.operator == "CONV_2D" and read == created == 1
            time += (0.01 * positions * tiles * (2 + read) + 20.0 * is_single) / faster
        elif step.operator == "DEPTHWISE_CONV_2D":
            time += 0.05 * positions * tiles / faster
        elif step.operator in ("MAX_POOL_2D", "ADD", "MEAN"):
            time += 0.001 * positions * created
    return time


@pytest.fixture
def timed(monkeypatch):
    """The numbers of files that were timed together, in order."""
    counts = []

    def times(files):
        counts.append(len(files))
        return [made_up_time(content) for content in files]

    monkeypatch.setattr(layer_latency, "_total_times", times)
    return counts


def network():
    inputs = keras.Input((16,), name="x")
    x = layers.Dense(12, activation="relu", name="fc")(inputs)
    x = layers.Dense(12, activation="relu", name="again")(layers.Dropout(0.1)(x))
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name="network")


def images():
    x = inputs = keras.Input((12, 12, 1), name="image")
    x = layers.Conv2D(20, 3, padding="same", name="stem")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn")(x))
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", name="depthwise")(x)
    y = layers.Conv2D(18, 1, activation="relu", name="a")(x)
    y = layers.Conv2D(20, 1, name="b")(y)
    x = layers.MaxPooling2D(name="pool")(layers.Add(name="add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="images")


def pruned_at_random(model, table, share, seed):
    """A network on a budget of MACs with random gates: its predicted time, and the network."""
    pm = kp.PrunableModel(model, kp.Budget(macs=share), policy="random", latency_table=table)
    rng = np.random.default_rng(seed)
    sizes = [size for source in pm.gated.sources for size in source.group_sizes]
    scores = np.concatenate([rng.normal(size=size) + rng.normal() for size in sizes])
    pm.controller.policy.scores = lambda: keras.ops.convert_to_tensor(scores, "float32")
    pm.controller.land()
    return pm.gated.cost.exact("latency", pm.gated.kept_neurons()), kp.compact(pm)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["float32", "int8"])
def test_pruned_networks_take_as_long_as_predicted(of, timed, tmp_path):
    model = images()
    table = latency_table(model, of=of, cache_dir=tmp_path)
    assert (table.of, table.overhead) == (of, OVERHEAD)
    assert table.scale == pytest.approx(1.0, rel=1e-6)
    dense = CostModel(analyze(model), latency_table=table).dense("latency")
    assert dense == pytest.approx(made_up_time(_converted(model, of)), rel=1e-9)
    for share, seed in [(0.5, 0), (0.15, 1)]:
        predicted, small = pruned_at_random(model, table, share, seed)
        assert predicted == pytest.approx(made_up_time(_converted(small, of)), rel=0.01)


@pytest.fixture
def measured(monkeypatch):
    """Names of layers that were measured, by times that need no conversion."""
    names = []

    def rows(part, of):
        names.extend(part)
        return {name: [[0, 0, 2.0 + (of == "int8")]] for name in part}

    monkeypatch.setattr(layer_latency, "_measured", rows)
    monkeypatch.setattr(layer_latency, "_converted", lambda model, of: b"")
    monkeypatch.setattr(layer_latency, "_nothing", lambda of: b"")  # the real one is kept for good
    monkeypatch.setattr(layer_latency, "_total_times", lambda files: [1.0, 9.0])
    return names


def test_times_are_measured_once_kept_and_measured_again_on_request(measured, tmp_path):
    model = network()
    table = latency_table(model, cache_dir=tmp_path)
    assert len(table.layers) == len(measured) == 3
    (file,) = tmp_path.iterdir()
    stored = json.loads(file.read_text())
    assert stored["format"] == layer_latency._FORMAT
    assert set(table.layers) < set(stored["times"]["float32"])
    assert not stored["times"]["int8"]
    assert latency_table(network(), cache_dir=tmp_path) == table
    assert len(measured) == 3
    assert latency_table(network(), refresh=True, cache_dir=tmp_path) == table
    assert len(measured) == 6
    of_int8 = latency_table(network(), of="int8", cache_dir=tmp_path)
    assert (of_int8.of, {t.constant for t in of_int8.layers.values()}) == ("int8", {3.0})
    assert latency_table(network(), cache_dir=tmp_path) == table
    assert len(measured) == 9


def test_what_the_whole_model_takes_decides(measured, tmp_path):
    model = network()
    table = latency_table(model, cache_dir=tmp_path)
    assert (table.scale, table.overhead) == (pytest.approx((9.0 - 1.0) / (3 * 2.0)), 1.0)
    assert CostModel(analyze(model), latency_table=table).dense("latency") == pytest.approx(9.0)


def test_files_of_another_format_are_measured_again_and_spoilt_ones_refused(measured, tmp_path):
    table = latency_table(network(), cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({"Dense of 16": [1.0, 0.1, 0.0, 0.0]}))  # the first format
    assert latency_table(network(), cache_dir=tmp_path) == table
    assert len(measured) == 6
    file.write_text("{")
    with pytest.raises(ExportError, match=r"latency_.*not a file of latencies"):
        latency_table(network(), cache_dir=tmp_path)


def test_layers_that_cannot_be_resized_are_timed_as_they_are(timed, tmp_path):
    inputs = keras.Input((6, 8), name="x")
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = layers.Conv1D(8, 3, groups=2, name="grouped")(x)
    model = keras.Model(inputs, layers.LSTM(5, name="lstm")(x))
    table = latency_table(model, cache_dir=tmp_path)
    assert timed == [2, 2, 2, 2]
    for times in table.layers.values():
        assert times.at(1, 1) == times.at(8, 8) == times.constant


def test_a_file_is_wanted_that_can_be_timed():
    with pytest.raises(InvalidArgumentError, match=r"'float32', 'int8'.*Received: of='float16'"):
        latency_table(network(), of="float16")


def test_a_branch_of_a_file_has_what_its_output_is_computed_from():
    first, second = keras.Input((4,), name="first"), keras.Input((5,), name="second")
    outputs = [layers.Dense(3, activation="relu")(first), layers.Dense(2)(second)]
    model = keras.Model([first, second], outputs)
    signature = Signature.of(model, 1)
    content = convert(model, signature)
    files = file_parts(content, signature.outputs)
    for file, given, output in zip(files, (first, second), outputs, strict=True):
        part = read_graph(file)
        assert [step.operator for step in part.operations] == ["FULLY_CONNECTED"]
        assert [part.tensors[i].shape for i in part.inputs] == [(1, given.shape[1])]
        assert [part.tensors[i].shape for i in part.outputs] == [(1, output.shape[1])]
        assert len(part.tensors) == 3  # two activations and weights: biases are zero
        assert len(file) < len(content)
