"""The four networks of the MLPerf Tiny benchmark, as its reference implementation builds them.

Layers, sizes, biases, order and initial distributions are the reference's
(https://github.com/mlcommons/tiny, ``benchmark/training``), and so are the numbers of parameters of
its trained models. Two things differ. The classifiers put out logits, as every network here does,
where the reference ends in a softmax: train with ``from_logits=True``, and put
``kp.export.with_head(model, "softmax")`` around what is exported. And the reference's penalty of
``1e-4`` on the squares of (not depthwise) convolution kernels is there on demand: ``l2=1e-4``.

References:
    Banbury et al. 2021, "MLPerf Tiny Benchmark", table 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

from tf_kfacprune.zoo.parts import Seeds, glorot, he_normal, logits, seeds_of

__all__ = ["ds_cnn", "fc_autoencoder", "mobilenet_v1_025", "resnet8"]

Shape = Sequence[int]


def resnet8(
    input_shape: Shape = (32, 32, 3),
    num_classes: int = 10,
    seed: int | None = None,
    *,
    l2: float = 0.0,
) -> keras.Model:
    """ResNet-8 for image classification: three residual blocks, 16-32-64 channels; 78,666 weights.

    The 1 x 1 convolutions of the shortcuts have no BatchNormalization. Quality target of the
    benchmark: 85 % of CIFAR-10's test images.

    Args:
        input_shape: ``(height, width, channels)`` of one image. Pixels are taken as they are: the
            reference trains on 0 to 255.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.
        l2: Factor of the penalty on squared convolution kernels; ``1e-4`` in the reference.

    Returns:
        A built Functional model.

    References:
        ``image_classification/keras_model.py``, ``resnet_v1_eembc(conv_filters=16)`` (16 filters
        are the benchmark's; 26, the default of later versions of that file, are not).
    """
    seeds = seeds_of(seed)

    def convolve(x: Any, filters: int, size: int, strides: int, name: str) -> Any:
        return _convolution(x, filters, size, strides, name, he_normal(seeds), l2)

    inputs = keras.Input(tuple(input_shape), name="image")
    x = _normalized(convolve(inputs, 16, 3, 1, "stem"), "stem")
    for stage, filters in enumerate((16, 32, 64), start=1):
        name, strides = f"stage{stage}", 1 if stage == 1 else 2
        y = _normalized(convolve(x, filters, 3, strides, f"{name}_a"), f"{name}_a")
        y = convolve(y, filters, 3, 1, f"{name}_b")
        y = layers.BatchNormalization(name=f"{name}_b_bn")(y)
        if strides == 2:
            x = convolve(x, filters, 1, strides, f"{name}_shortcut")
        x = layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))
    x = layers.AveragePooling2D(min(x.shape[1:3]), name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, logits(x, num_classes, he_normal(seeds)), name="resnet8")


def ds_cnn(
    input_shape: Shape = (49, 10, 1),
    num_classes: int = 12,
    seed: int | None = None,
    *,
    l2: float = 0.0,
) -> keras.Model:
    """DS-CNN for keyword spotting: four depthwise separable blocks of 64; 24,908 weights.

    Quality target of the benchmark: 90 % of the test words of Speech Commands v2 (10 words,
    silence and unknown).

    Args:
        input_shape: ``(frames, coefficients, 1)`` of one example: 10 MFCCs of 49 windows.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.
        l2: Factor of the penalty on squared convolution kernels; ``1e-4`` in the reference.

    Returns:
        A built Functional model.

    References:
        ``keyword_spotting/keras_model.py``, ``model_architecture="ds_cnn"``; Zhang, Suda, Lai &
        Chandra 2017, "Hello Edge: Keyword Spotting on Microcontrollers".
    """
    seeds = seeds_of(seed)
    inputs = keras.Input(tuple(input_shape), name="features")
    x = _convolution(inputs, 64, (10, 4), 2, "stem", glorot(seeds), l2)
    x = layers.Dropout(0.2, name="stem_dropout")(_normalized(x, "stem"))
    for number in range(1, 5):
        name = f"block{number}"
        x = _normalized(_depthwise(x, 1, f"{name}_depthwise", seeds), f"{name}_depthwise")
        x = _convolution(x, 64, 1, 1, f"{name}_pointwise", glorot(seeds), l2)
        x = _normalized(x, f"{name}_pointwise")
    x = layers.Dropout(0.4, name="dropout")(x)
    # Half of the input's shape, rounded down, while the stem rounds up: of 25 rows the last is
    # left out, as in the reference.
    pool = (input_shape[0] // 2, input_shape[1] // 2)
    x = layers.Flatten(name="flatten")(layers.AveragePooling2D(pool, name="pool")(x))
    return keras.Model(inputs, logits(x, num_classes, glorot(seeds)), name="ds_cnn")


def mobilenet_v1_025(
    input_shape: Shape = (96, 96, 3),
    num_classes: int = 2,
    seed: int | None = None,
    *,
    l2: float = 0.0,
) -> keras.Model:
    """MobileNetV1, a quarter as wide, for visual wake words: 13 separable blocks; 221,794 weights.

    Quality target of the benchmark: 80 % of the test images (is there a person?).

    Args:
        input_shape: ``(height, width, channels)`` of one image.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.
        l2: Factor of the penalty on squared convolution kernels; ``1e-4`` in the reference.

    Returns:
        A built Functional model.

    References:
        ``visual_wake_words/vww_model.py``, ``mobilenet_v1``; Howard et al. 2017, "MobileNets:
        Efficient Convolutional Neural Networks for Mobile Vision Applications", table 1.
    """
    seeds = seeds_of(seed)
    inputs = keras.Input(tuple(input_shape), name="image")
    x = _convolution(inputs, 8, 3, 2, "stem", he_normal(seeds), l2)
    x = _normalized(x, "stem")
    widths = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
    for number, filters in enumerate(widths, start=1):
        name, strides = f"block{number}", 2 if number in (2, 4, 6, 12) else 1
        x = _normalized(_depthwise(x, strides, f"{name}_depthwise", seeds), f"{name}_depthwise")
        x = _convolution(x, filters, 1, 1, f"{name}_pointwise", he_normal(seeds), l2)
        x = _normalized(x, f"{name}_pointwise")
    x = layers.AveragePooling2D(tuple(x.shape[1:3]), name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, logits(x, num_classes, glorot(seeds)), name="mobilenet_v1_025")


def fc_autoencoder(input_shape: Shape = (640,), seed: int | None = None) -> keras.Model:
    """Autoencoder for anomaly detection: 128 x 4, 8, 128 x 4 neurons; 269,992 weights.

    It is trained to put out its own input, by the mean squared error, which then measures how
    unusual an example is. Quality target of the benchmark: an AUC of 0.85 (ToyADMOS, toy cars).

    Args:
        input_shape: Shape of one example, which the network takes and puts out flattened: 5 frames
            of 128 mel bands.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model, ``(batch, values) -> (batch, values)``.

    References:
        ``anomaly_detection/keras_model.py``, ``get_model``; the baseline of DCASE 2020, task 2.
    """
    seeds = seeds_of(seed)
    size = math.prod(input_shape)
    x = inputs = keras.Input((size,), name="frames")
    for number, units in enumerate((128,) * 4 + (8,) + (128,) * 4, start=1):
        x = layers.Dense(units, kernel_initializer=glorot(seeds), name=f"fc{number}")(x)
        x = _normalized(x, f"fc{number}")
    outputs = layers.Dense(size, kernel_initializer=glorot(seeds), name="reconstruction")(x)
    return keras.Model(inputs, outputs, name="fc_autoencoder")


def _convolution(
    x: Any,
    filters: int,
    size: int | tuple[int, int],
    strides: int,
    name: str,
    initializer: keras.initializers.Initializer,
    l2: float,
) -> Any:
    """A convolution with bias, as the reference has it in front of a BatchNormalization, too."""
    return layers.Conv2D(
        filters,
        size,
        strides,
        padding="same",
        kernel_initializer=initializer,
        kernel_regularizer=keras.regularizers.L2(l2) if l2 else None,
        name=f"{name}_conv",
    )(x)


def _depthwise(x: Any, strides: int, name: str, seeds: Seeds) -> Any:
    """A 3 x 3 depthwise convolution.

    What the reference gives as its kernel's initializer and regularizer are arguments that the
    layer does not use for its depthwise kernel, so that Keras' defaults hold: Glorot, no penalty.
    """
    return layers.DepthwiseConv2D(
        3, strides, padding="same", depthwise_initializer=glorot(seeds), name=f"{name}_conv"
    )(x)


def _normalized(x: Any, name: str) -> Any:
    x = layers.BatchNormalization(name=f"{name}_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(x)
