"""Prune, compact and export on real data: every format keeps the accuracy of the compact model."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import keras
import numpy as np
import pytest

import tf_kfacprune as kp

# Folder with mnist.npz and cifar10_jpeg.npz or cifar10.npz; beside the repository by default.
DATA = Path(os.environ.get("KFACPRUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))
FORMATS = (None, "float16", "dynamic", "int8", "int16x8")
POINTS = {None: 0.3, "float16": 0.3, "dynamic": 0.3, "int8": 0.5, "int16x8": 0.3}
L = keras.layers
SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


@functools.cache
def loaded(name):
    """Some thousand images; those of CIFAR-10 at half the size, which is a quarter of the work."""
    data = kp.data.load(name, DATA)
    step = 2 if name == "cifar10" else 1
    arrays = [data.x_train[:3000, ::step, ::step], data.y_train[:3000]]
    return *arrays, data.x_test[:2000, ::step, ::step], data.y_test[:2000]


def normalized(x, filters, size, strides=1, activate=True, depthwise=False):
    kind = L.DepthwiseConv2D if depthwise else L.Conv2D
    options = {"strides": strides, "padding": "same", "use_bias": False}
    x = kind(size, **options)(x) if depthwise else kind(filters, size, **options)(x)
    x = L.BatchNormalization(momentum=0.9)(x)
    return L.ReLU(6.0 if depthwise else None)(x) if activate else x


def residual(shape):
    """A ResNet of three blocks, one in each stage."""
    image = keras.Input(shape, name="image")
    x = normalized(image, 12, 3)
    for filters, strides in [(12, 1), (16, 2), (24, 2)]:
        y = normalized(x, filters, 3, strides)
        y = normalized(y, filters, 3, activate=False)
        if strides == 2:
            x = normalized(x, filters, 1, strides, activate=False)
        x = L.ReLU()(L.Add()([x, y]))
    return keras.Model(image, L.Dense(10)(L.GlobalAveragePooling2D()(x)), name="residual")


def inverted(shape):
    """A MobileNetV2 of three inverted residual blocks."""
    image = keras.Input(shape, name="image")
    x = normalized(image, 12, 3, 1)
    for filters, strides in [(12, 1), (20, 2), (20, 1)]:
        y = normalized(x, 4 * x.shape[-1], 1)
        y = normalized(y, None, 3, strides, depthwise=True)
        y = normalized(y, filters, 1, activate=False)
        x = L.Add()([x, y]) if strides == 1 else y
    return keras.Model(image, L.Dense(10)(L.GlobalAveragePooling2D()(x)), name="inverted")


@pytest.mark.parametrize(
    ("build", "name", "budget"),
    [
        pytest.param(lambda shape: kp.zoo.lenet5(shape, seed=0), "mnist", 0.05, marks=SLOW),
        pytest.param(residual, "cifar10", 0.5, marks=SLOW),
        pytest.param(inverted, "cifar10", 0.5, marks=SLOW),
    ],
    ids=["lenet5-mnist", "resnet-cifar10", "mobilenet-cifar10"],
)
def test_every_format_keeps_the_accuracy_of_the_pruned_model(build, name, budget, tmp_path):
    if not any(DATA.glob(f"{name}*.npz")):
        pytest.skip(f"no {name} in {DATA}; set KFACPRUNE_DATA to a folder with {name}.npz")
    x, y, x_test, y_test = loaded(name)
    keras.utils.set_random_seed(0)
    pm = kp.PrunableModel(build(x.shape[1:]), budget=kp.Budget(params=budget), seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pm.compile(keras.optimizers.Adam(3e-3), loss=loss, metrics=["accuracy"])
    pm.fit(x, y, batch_size=64, epochs=4, verbose=0)
    small = kp.compact(pm)
    expected = kp.reporting.accuracy(small, x_test, y_test)
    assert expected > 0.3  # not the guess of one class in ten
    for quantization in FORMATS:
        file = kp.export.tflite(
            small,
            tmp_path / f"{quantization}.tflite",
            quantization=quantization,
            representative_data=x if quantization in ("int8", "int16x8") else None,
            batch_size=1,
        )
        found = np.mean(kp.export.run_tflite(file, x_test).argmax(axis=1) == y_test)
        assert 100 * abs(found - expected) <= POINTS[quantization] + 1e-6, quantization
