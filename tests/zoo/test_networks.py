"""Built-in networks: sizes of the literature, repeatable weights, prunable throughout."""

from __future__ import annotations

import numpy as np
import pytest

from tf_kfacprune import zoo
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.reporting import inspect

# The figures that the literature starts from (MACs and its "weights" leave biases out).
FIGURES = {
    "lenet300": (266_610, 266_200),
    "lenet5": (431_080, 2_293_000),
    "digits_cnn": (53_002, 347_392),
    "mobilenetv2": (140_234, 7_401_984),
    "resnet20": (274_042, 40_813_184),  # with projections; 40.55M MACs without
    "resnet8": (78_666, 12_501_632),
    "ds_cnn": (24_908, 2_656_768),
    "mobilenet_v1_025": (221_794, 7_489_664),
    "fc_autoencoder": (269_992, 264_192),
}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_parameters_and_macs_are_those_of_the_literature(name):
    inspection = inspect(zoo.build(name))
    assert (inspection.params, inspection.macs) == FIGURES[name]
    assert inspection.groups


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_seed_fixes_the_weights_and_layers_differ(name):
    one, two = (zoo.build(name, seed=3).get_weights() for _ in range(2))
    other = zoo.build(name, seed=4).get_weights()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[0], other[0])
    kernels = [w.ravel()[:8] for w in one if w.ndim > 1]
    assert len({tuple(k.tolist()) for k in kernels}) == len(kernels)


def test_shape_and_classes_can_be_chosen():
    model = zoo.build("digits_cnn", (12, 10, 3), num_classes=4)
    assert model.input_shape == (None, 12, 10, 3)
    assert model.output_shape == (None, 4)


def test_flattened_network_takes_images_of_any_shape_flattened():
    assert zoo.build("lenet300", (8, 8, 1)).input_shape == (None, 64)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InvalidArgumentError, match="Did you mean 'lenet5'"):
        zoo.build("lenet-5")


def test_shape_that_does_not_fit_is_named():
    with pytest.raises(InvalidArgumentError, match=r"'lenet5'.*\(8, 8, 1\)"):
        zoo.build("lenet5", (8, 8, 1))
