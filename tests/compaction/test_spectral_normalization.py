"""`SpectralNormalization` layers are pruned like the layers they wrap."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tf_kfacprune.compaction import compact
from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.graph import CostModel, analyze


def images(*wrapped):
    inputs = keras.Input((6, 6, 4), name="x")
    x = inputs
    for layer in wrapped:
        x = layers.SpectralNormalization(layer)(x)
    x = layers.GlobalAveragePooling2D()(layers.LeakyReLU()(x))
    return keras.Model(inputs, layers.SpectralNormalization(layers.Dense(2), name="head")(x))


def projections():
    inputs = keras.Input((5, 4), name="x")
    x = layers.SpectralNormalization(layers.EinsumDense("abc,cde->abde", (None, 3, 4)))(inputs)
    x = layers.SpectralNormalization(layers.EinsumDense("abde,def->abf", (None, 6)))(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


CASES = {
    "convolutions": lambda: images(
        layers.Conv2D(6, 3, activation="tanh"), layers.Conv2D(5, 1, use_bias=False)
    ),
    "grouped": lambda: images(layers.Conv2D(4, 1), layers.Conv2D(8, 1, groups=2)),
    "depthwise": lambda: images(layers.Conv2D(6, 1), layers.DepthwiseConv2D(3)),
    "transposed": lambda: images(layers.Conv2D(5, 1), layers.Conv2DTranspose(6, 3)),
    "einsum": projections,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prune_inputs", [False, True], ids=["", "inputs"])
def test_compact_equals_gated(case, prune_inputs, assert_exact):
    model = CASES[case]()
    channels = analyze(model, prune_inputs=prune_inputs)
    assert {record.layer for record in channels.frozen} == {"head"}
    assert ("x" in {group.name for group in channels.groups}) == prune_inputs
    assert_exact(model, prune_inputs=prune_inputs)


def test_training_scales_the_kernel_of_the_compact_model_on(assert_exact):
    gated = assert_exact(CASES["convolutions"]())
    network = GatedNetwork(gated)
    (bank,) = network.sources
    bank.set_values(np.arange(bank.size) % 2)
    small = compact(gated)
    x = np.ones((2, 6, 6, 4), "float32")
    for _ in range(20):
        small(x, training=True)
    for layer in small.layers:
        if isinstance(layer, layers.SpectralNormalization):
            matrix = np.reshape(layer.layer.kernel, (-1, layer.layer.kernel.shape[-1]))
            assert np.linalg.norm(matrix, 2) == pytest.approx(1.0, abs=1e-2)


def test_costs_are_those_of_the_wrapped_layers():
    cost = CostModel(analyze(CASES["convolutions"]()))
    assert cost.macs_dense == 16 * 9 * 4 * 6 + 16 * 6 * 5 + 5 * 2
    assert cost.params_dense == CASES["convolutions"]().count_params()
