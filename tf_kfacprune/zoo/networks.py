"""Small networks of ordinary Keras layers; every one puts out logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

from tf_kfacprune.zoo.parts import convolution_without_bias, glorot, logits, seeds_of

__all__ = ["digits_cnn", "lenet5", "lenet300", "mobilenetv2", "resnet20"]

Shape = Sequence[int]


def lenet300(
    input_shape: Shape = (784,), num_classes: int = 10, seed: int | None = None
) -> keras.Model:
    """LeNet-300-100: two hidden layers on flattened inputs; 266,610 parameters on MNIST.

    Args:
        input_shape: Shape of one example. The network takes it flattened, so that every pixel is
            a feature that can be pruned.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model, ``(batch, pixels) -> (batch, num_classes)``.

    References:
        LeCun, Bottou, Bengio & Haffner 1998, section III.
    """
    seeds = seeds_of(seed)
    x = inputs = keras.Input((math.prod(input_shape),), name="pixels")
    x = layers.Dense(300, "relu", kernel_initializer=glorot(seeds), name="fc1")(x)
    x = layers.Dense(100, "relu", kernel_initializer=glorot(seeds), name="fc2")(x)
    return keras.Model(inputs, logits(x, num_classes, glorot(seeds)), name="lenet300")


def lenet5(
    input_shape: Shape = (28, 28, 1), num_classes: int = 10, seed: int | None = None
) -> keras.Model:
    """LeNet-5 as in Caffe, 20-50-800-500; 431,080 parameters on MNIST.

    Args:
        input_shape: ``(height, width, channels)`` of one image, at least 16 pixels each way.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model.

    References:
        LeCun et al. 1998; sizes of the Caffe example that the pruning literature uses.
    """
    seeds = seeds_of(seed)
    x = inputs = keras.Input(tuple(input_shape), name="image")
    x = layers.Conv2D(20, 5, kernel_initializer=glorot(seeds), name="conv1")(x)
    x = layers.MaxPooling2D(name="pool1")(x)
    x = layers.Conv2D(50, 5, kernel_initializer=glorot(seeds), name="conv2")(x)
    x = layers.MaxPooling2D(name="pool2")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(500, "relu", kernel_initializer=glorot(seeds), name="fc1")(x)
    return keras.Model(inputs, logits(x, num_classes, glorot(seeds)), name="lenet5")


def digits_cnn(
    input_shape: Shape = (8, 8, 1), num_classes: int = 10, seed: int | None = None
) -> keras.Model:
    """A small convolutional network for the 8 x 8 digits: 32-64-128.

    Args:
        input_shape: ``(height, width, channels)`` of one image, at least 4 pixels each way.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model.
    """
    seeds = seeds_of(seed)
    x = inputs = keras.Input(tuple(input_shape), name="image")
    for number, filters in [(1, 32), (2, 64)]:
        x = layers.Conv2D(
            filters,
            3,
            padding="same",
            activation="relu",
            kernel_initializer=glorot(seeds),
            name=f"conv{number}",
        )(x)
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(128, "relu", kernel_initializer=glorot(seeds), name="fc1")(x)
    return keras.Model(inputs, logits(x, num_classes, glorot(seeds)), name="digits_cnn")


def resnet20(
    input_shape: Shape = (32, 32, 3), num_classes: int = 10, seed: int | None = None
) -> keras.Model:
    """ResNet-20 for CIFAR: three stages of three residual blocks, 16-32-64 channels.

    Shortcuts that change the shape are 1 x 1 convolutions with BatchNormalization.

    Args:
        input_shape: ``(height, width, channels)`` of one image.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model.

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", section 4.2.
    """
    seeds = seeds_of(seed)

    def convolve(x: Any, filters: int, size: int, strides: int, name: str, activate: bool) -> Any:
        x = convolution_without_bias(x, filters, size, strides, name, seeds)
        return layers.ReLU(name=f"{name}_relu")(x) if activate else x

    inputs = keras.Input(tuple(input_shape), name="image")
    x = convolve(inputs, 16, 3, 1, "stem", activate=True)
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(1, 4):
            name = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            y = convolve(x, filters, 3, strides, f"{name}_a", activate=True)
            y = convolve(y, filters, 3, 1, f"{name}_b", activate=False)
            if strides == 2:
                x = convolve(x, filters, 1, strides, f"{name}_shortcut", activate=False)
            x = layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, logits(x, num_classes, glorot(seeds)), name="resnet20")


def mobilenetv2(
    input_shape: Shape = (32, 32, 3), num_classes: int = 10, seed: int | None = None
) -> keras.Model:
    """MobileNetV2 for small images: seven inverted residual blocks, 16-24-32-64 channels.

    Each block widens by 1 x 1 convolutions, filters every channel by itself, and narrows again.
    Images are halved three times. (`keras.applications.MobileNetV2` halves them five times, and of
    32 x 32 pixels leaves one.)

    Args:
        input_shape: ``(height, width, channels)`` of one image.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model.

    References:
        Sandler, Howard, Zhu, Zhmoginov & Chen 2018, "MobileNetV2: Inverted Residuals and Linear
        Bottlenecks", section 3.
    """
    seeds = seeds_of(seed)

    def activate(x: Any, name: str) -> Any:
        return layers.ReLU(6.0, name=f"{name}_relu")(x)

    def block(x: Any, filters: int, strides: int, expansion: int, name: str) -> Any:
        y, channels = x, x.shape[-1]
        if expansion > 1:
            expanded = convolution_without_bias(
                y, expansion * channels, 1, 1, f"{name}_expand", seeds
            )
            y = activate(expanded, f"{name}_expand")
        y = activate(
            convolution_without_bias(y, None, 3, strides, f"{name}_depthwise", seeds),
            f"{name}_depthwise",
        )
        y = convolution_without_bias(y, filters, 1, 1, f"{name}_project", seeds)
        same = strides == 1 and filters == channels
        return layers.Add(name=f"{name}_add")([x, y]) if same else y

    inputs = keras.Input(tuple(input_shape), name="image")
    x = activate(convolution_without_bias(inputs, 16, 3, 2, "stem", seeds), "stem")
    x = block(x, 16, 1, 1, "stage1_block1")
    for stage, filters in enumerate((24, 32, 64), start=2):
        for number in (1, 2):
            strides = 2 if stage > 2 and number == 1 else 1
            x = block(x, filters, strides, 6, f"stage{stage}_block{number}")
    x = activate(convolution_without_bias(x, 256, 1, 1, "head", seeds), "head")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, logits(x, num_classes, glorot(seeds)), name="mobilenetv2")
