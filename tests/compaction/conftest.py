from __future__ import annotations

import numpy as np
import pytest

from tf_kfacprune.compaction import compact, parity_error, random_inputs
from tf_kfacprune.gates import GatedNetwork, insert_gates
from tf_kfacprune.graph import CostModel, analyze

SCALES = ("gamma", "moving_variance", "scale")


def randomize(model, rng):
    """Gives every weight that starts as a constant, and every kernel, a random value."""
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in SCALES:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif "seed" not in kind:
            weight.assign(rng.normal(size=weight.shape) * 0.5)


def assert_exact(model, *, data=None, prune_inputs=False, prune_features=False, tolerance=1e-5):
    """Compact equals gated for hard, soft and wholly closed gates; open gates change nothing."""
    rng = np.random.default_rng(0)
    randomize(model, rng)
    gated = insert_gates(model, prune_inputs=prune_inputs, prune_features=prune_features)
    x = random_inputs(model) if data is None else data
    dense, network = model(x, training=False), GatedNetwork(gated)
    assert parity_error(dense, gated(x, training=False)) == 0
    (bank,) = network.sources
    soft = rng.uniform(0.2, 1.0, bank.size) * (rng.uniform(size=bank.size) < 0.6)
    for values in (np.ceil(soft), soft, np.zeros(bank.size)):
        bank.set_values(values)
        small = compact(gated, verify=False)
        pruned = gated(x, training=False)
        assert parity_error(dense, pruned) > 1e-3
        assert parity_error(pruned, small(x, training=False)) <= tolerance
        kept = network.kept_neurons()
        assert small.count_params() == network.cost.count("params", kept) < model.count_params()
        assert CostModel(analyze(small)).macs_dense == network.cost.count("macs", kept)
        assert all(type(layer).__module__.startswith("keras.") for layer in small.layers)
    return gated


@pytest.fixture(name="assert_exact")
def assert_exact_fixture():
    return assert_exact
