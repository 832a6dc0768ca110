"""Networks of MLPerf Tiny: weights as in the reference's trained models, prunable, compact."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError

# Input and output shapes, and weights in the trained models that the reference ships
# (pretrainedResnet.h5, kws_ref_model, vww_96.h5, ad01.h5): all, and without moving statistics.
REFERENCE = {
    "resnet8": ((32, 32, 3), 10, 78_666, 78_186),
    "ds_cnn": ((49, 10, 1), 12, 24_908, 23_756),
    "mobilenet_v1_025": ((96, 96, 3), 2, 221_794, 216_322),
    "fc_autoencoder": ((640,), 640, 269_992, 267_928),
}
networks = pytest.mark.parametrize("name", REFERENCE)


@networks
def test_shapes_and_weights_are_those_of_the_reference(name):
    shape, outputs, weights, trainable = REFERENCE[name]
    model = getattr(kp.zoo, name)()
    assert model.input_shape == (None, *shape)
    assert model.output_shape == (None, outputs)
    assert model.count_params() == weights
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == trainable


@networks
def test_built_by_name_it_is_the_same_network(name):
    model = kp.zoo.build(name, seed=1)
    assert model.name == name
    other = getattr(kp.zoo, name)(seed=1)
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "name",
    # Layer by layer the largest is what ds_cnn is, three times as deep.
    [
        "resnet8",
        "ds_cnn",
        "fc_autoencoder",
        pytest.param("mobilenet_v1_025", marks=pytest.mark.slow),
    ],
)
def test_closing_half_of_the_macs_leaves_a_compact_model_of_the_same_function(name):
    shape, outputs, _, _ = REFERENCE[name]
    network = kp.zoo.build(name, seed=0)
    inspection = kp.inspect(network)
    assert len(inspection.groups) >= 4
    model = kp.PrunableModel(network, budget=kp.Budget(macs=0.5))
    model.compile(
        optimizer=keras.optimizers.SGD(1e-3),
        loss=keras.losses.MeanSquaredError(),
        run_eagerly=True,  # two steps: tracing them takes longer than taking them
    )
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")
    y = np.zeros((8, outputs), "float32")
    model.fit(x, y, batch_size=4, epochs=1, verbose=0)
    small = kp.compact(model)  # compares the outputs of both, or raises
    cost = kp.inspect(small)
    assert cost.macs <= 0.5 * inspection.macs
    assert small.output_shape == (None, outputs)
    np.testing.assert_allclose(
        small.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-4
    )


def test_the_penalty_is_on_convolution_kernels_only_and_only_on_demand():
    assert kp.zoo.ds_cnn().losses == []
    model = kp.zoo.ds_cnn(l2=1e-4)
    kernels = [layer.kernel for layer in model.layers if type(layer) is keras.layers.Conv2D]
    assert len(kernels) == 5
    expected = sum(1e-4 * np.sum(np.square(np.asarray(kernel.value))) for kernel in kernels)
    np.testing.assert_allclose(float(sum(model.losses)), expected, rtol=1e-5)


def test_the_pooling_of_ds_cnn_leaves_the_last_of_25_rows_out():
    model = kp.zoo.ds_cnn(seed=0)
    rows = keras.Model(model.input, model.get_layer("dropout").output)
    assert rows.output_shape == (None, 25, 5, 64)
    assert model.get_layer("pool").output.shape == (None, 1, 1, 64)


def test_the_autoencoder_has_no_classes_and_says_so():
    with pytest.raises(InvalidArgumentError, match=r"no classes.*num_classes=10"):
        kp.zoo.build("fc_autoencoder", num_classes=10)
    assert kp.zoo.build("fc_autoencoder", (5, 128)).output_shape == (None, 640)


def test_other_shapes_and_classes():
    assert kp.zoo.resnet8((48, 40, 1), 3).output_shape == (None, 3)
    assert kp.zoo.mobilenet_v1_025((64, 64, 3), 5).output_shape == (None, 5)
