"""Small networks of ordinary Keras layers; every one puts out logits."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import layers

from tf_kfacprune.errors import InvalidArgumentError

__all__ = [
    "NAMES",
    "build",
    "default_input_shape",
    "digits_cnn",
    "lenet5",
    "lenet300",
    "mobilenetv2",
    "resnet20",
]

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
    seeds = _seeds(seed)
    x = inputs = keras.Input((math.prod(input_shape),), name="pixels")
    x = layers.Dense(300, "relu", kernel_initializer=_glorot(seeds), name="fc1")(x)
    x = layers.Dense(100, "relu", kernel_initializer=_glorot(seeds), name="fc2")(x)
    return keras.Model(inputs, _logits(x, num_classes, seeds), name="lenet300")


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
    seeds = _seeds(seed)
    x = inputs = keras.Input(tuple(input_shape), name="image")
    x = layers.Conv2D(20, 5, kernel_initializer=_glorot(seeds), name="conv1")(x)
    x = layers.MaxPooling2D(name="pool1")(x)
    x = layers.Conv2D(50, 5, kernel_initializer=_glorot(seeds), name="conv2")(x)
    x = layers.MaxPooling2D(name="pool2")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(500, "relu", kernel_initializer=_glorot(seeds), name="fc1")(x)
    return keras.Model(inputs, _logits(x, num_classes, seeds), name="lenet5")


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
    seeds = _seeds(seed)
    x = inputs = keras.Input(tuple(input_shape), name="image")
    for number, filters in [(1, 32), (2, 64)]:
        x = layers.Conv2D(
            filters,
            3,
            padding="same",
            activation="relu",
            kernel_initializer=_glorot(seeds),
            name=f"conv{number}",
        )(x)
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(128, "relu", kernel_initializer=_glorot(seeds), name="fc1")(x)
    return keras.Model(inputs, _logits(x, num_classes, seeds), name="digits_cnn")


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
    seeds = _seeds(seed)

    def convolve(x: Any, filters: int, size: int, strides: int, name: str, activate: bool) -> Any:
        x = _convolve(x, filters, size, strides, name, seeds)
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
    return keras.Model(inputs, _logits(x, num_classes, seeds), name="resnet20")


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
    seeds = _seeds(seed)

    def activate(x: Any, name: str) -> Any:
        return layers.ReLU(6.0, name=f"{name}_relu")(x)

    def block(x: Any, filters: int, strides: int, expansion: int, name: str) -> Any:
        y, channels = x, x.shape[-1]
        if expansion > 1:
            expanded = _convolve(y, expansion * channels, 1, 1, f"{name}_expand", seeds)
            y = activate(expanded, f"{name}_expand")
        y = activate(
            _convolve(y, None, 3, strides, f"{name}_depthwise", seeds), f"{name}_depthwise"
        )
        y = _convolve(y, filters, 1, 1, f"{name}_project", seeds)
        same = strides == 1 and filters == channels
        return layers.Add(name=f"{name}_add")([x, y]) if same else y

    inputs = keras.Input(tuple(input_shape), name="image")
    x = activate(_convolve(inputs, 16, 3, 2, "stem", seeds), "stem")
    x = block(x, 16, 1, 1, "stage1_block1")
    for stage, filters in enumerate((24, 32, 64), start=2):
        for number in (1, 2):
            strides = 2 if stage > 2 and number == 1 else 1
            x = block(x, filters, strides, 6, f"stage{stage}_block{number}")
    x = activate(_convolve(x, 256, 1, 1, "head", seeds), "head")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, _logits(x, num_classes, seeds), name="mobilenetv2")


_BUILDERS: dict[str, tuple[Callable[..., keras.Model], tuple[int, ...]]] = {
    "digits_cnn": (digits_cnn, (8, 8, 1)),
    "lenet300": (lenet300, (28, 28, 1)),
    "lenet5": (lenet5, (28, 28, 1)),
    "mobilenetv2": (mobilenetv2, (32, 32, 3)),
    "resnet20": (resnet20, (32, 32, 3)),
}
NAMES = tuple(_BUILDERS)


def default_input_shape(name: str) -> tuple[int, ...]:
    """Shape of the examples that a built-in network was designed for.

    Args:
        name: One of ``NAMES``.

    Returns:
        Shape without the batch axis.

    Raises:
        InvalidArgumentError: If there is no such network.
    """
    return _entry(name)[1]


def build(
    name: str,
    input_shape: Shape | None = None,
    num_classes: int = 10,
    seed: int | None = None,
) -> keras.Model:
    """Builds a network by name.

    Args:
        name: One of ``NAMES``.
        input_shape: Shape of one example; by default the one that it was designed for.
        num_classes: Number of logits.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model.

    Raises:
        InvalidArgumentError: If there is no such network or the shape does not fit it.

    Example:
        >>> build("lenet300").count_params()
        266610
    """
    builder, default = _entry(name)
    shape = tuple(default if input_shape is None else input_shape)
    try:
        return builder(shape, num_classes, seed)
    except ValueError as error:  # Keras: wrong rank, or nothing left after pooling
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgumentError(
            f"Network {name!r} cannot be built for examples of shape {shape}: {reason} "
            f"It was designed for {default}."
        ) from error


def _entry(name: str) -> tuple[Callable[..., keras.Model], tuple[int, ...]]:
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise InvalidArgumentError(
            f"Unknown network {name!r}."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Expected one of {', '.join(NAMES)}."
        )
    return _BUILDERS[name]


def _seeds(seed: int | None) -> Iterator[int | None]:
    """A seed of its own for every layer."""
    return itertools.repeat(None) if seed is None else itertools.count(1000 * seed)


def _glorot(seeds: Iterator[int | None]) -> keras.initializers.Initializer:
    return keras.initializers.GlorotUniform(seed=next(seeds))


def _convolve(
    x: Any,
    filters: int | None,
    size: int,
    strides: int,
    name: str,
    seeds: Iterator[int | None],
) -> Any:
    """A convolution without bias (depthwise without `filters`), then BatchNormalization."""
    initializer = keras.initializers.HeNormal(seed=next(seeds))
    options = {"padding": "same", "use_bias": False, "name": f"{name}_conv"}
    if filters is None:
        layer = layers.DepthwiseConv2D(size, strides, depthwise_initializer=initializer, **options)
    else:
        layer = layers.Conv2D(filters, size, strides, kernel_initializer=initializer, **options)
    return layers.BatchNormalization(name=f"{name}_bn")(layer(x))


def _logits(x: Any, num_classes: int, seeds: Iterator[int | None]) -> Any:
    return layers.Dense(num_classes, kernel_initializer=_glorot(seeds), name="logits")(x)
