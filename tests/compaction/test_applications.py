"""The smallest models of keras.applications; examples/benchmarks/applications.py runs all."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tf_kfacprune.compaction import compact, parity_error, random_inputs
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import analyze

RANGES = {
    "beta": (-0.5, 0.5),
    "moving_mean": (-0.5, 0.5),
    "bias": (-0.5, 0.5),
    "gamma": (0.5, 1.5),
    "moving_variance": (0.5, 1.5),
}


@pytest.mark.parametrize(
    ("name", "options", "branches"),
    [
        ("MobileNet", {"alpha": 0.25}, 0),
        ("MobileNetV2", {"alpha": 0.35}, 10),
        pytest.param("MobileNetV3Small", {}, 6, marks=pytest.mark.slow),
    ],
)
def test_compact_equals_gated(name, options, branches):
    rng = np.random.default_rng(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(32, 32, 3), classes=4, classifier_activation=None, **options
    )
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in RANGES:
            weight.assign(rng.uniform(*RANGES[kind], weight.shape))
    frozen = analyze(model).frozen
    assert sum(record.channels for record in frozen) == 4  # the classes, and nothing else
    gated, x = insert_gates(model), random_inputs(model, batch_size=4)
    dense = model(x, training=False)
    assert parity_error(dense, gated(x, training=False)) == 0
    (bank,) = GatedNetwork(gated).sources
    bank.set_values(rng.uniform(0.3, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.7))
    expected = gated(x, training=False)
    small = compact(gated, verify=False)
    assert parity_error(dense, expected) > 1e-2
    assert parity_error(expected, small(x, training=False)) <= 5e-6
    assert small.count_params() < 0.7 * model.count_params()
    network = GatedNetwork(gated)
    removable = [network.channels.groups[g] for g in sorted(network.cost.branches.removable)]
    assert len(removable) == branches
    if removable:
        values = np.array(bank.deterministic_values())
        for group in removable[::2]:
            values[network.neuron_gates[group.neurons, 0]] = 0.0
        bank.set_values(values)
        expected, small = gated(x, training=False), compact(gated, verify=False)
        assert parity_error(expected, small(x, training=False)) <= 5e-6
        kept = network.kept_neurons()
        assert small.count_params() == network.cost.count("params", kept)
        adders = [sum(isinstance(x, keras.layers.Add) for x in m.layers) for m in (model, small)]
        assert adders[1] == adders[0] - len(removable[::2])
