"""Layers that several networks end in or are made of, each with initial weights of its own seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import keras
from keras import layers

__all__ = ["Seeds", "convolution_without_bias", "glorot", "he_normal", "logits", "seeds_of"]

Seeds = Iterator[int | None]


def seeds_of(seed: int | None) -> Seeds:
    """A seed of its own for every layer."""
    return itertools.repeat(None) if seed is None else itertools.count(1000 * seed)


def glorot(seeds: Seeds) -> keras.initializers.Initializer:
    """The next layer's initializer: uniform, Glorot & Bengio 2010."""
    return keras.initializers.GlorotUniform(seed=next(seeds))


def he_normal(seeds: Seeds) -> keras.initializers.Initializer:
    """The next layer's initializer: normal, He, Zhang, Ren & Sun 2015."""
    return keras.initializers.HeNormal(seed=next(seeds))


def convolution_without_bias(
    x: Any, filters: int | None, size: int, strides: int, name: str, seeds: Seeds
) -> Any:
    """A convolution without bias (depthwise without `filters`), then BatchNormalization."""
    initializer = he_normal(seeds)
    options = {"padding": "same", "use_bias": False, "name": f"{name}_conv"}
    if filters is None:
        layer = layers.DepthwiseConv2D(size, strides, depthwise_initializer=initializer, **options)
    else:
        layer = layers.Conv2D(filters, size, strides, kernel_initializer=initializer, **options)
    return layers.BatchNormalization(name=f"{name}_bn")(layer(x))


def logits(x: Any, num_classes: int, initializer: keras.initializers.Initializer) -> Any:
    """The layer that puts out one logit per class."""
    return layers.Dense(num_classes, kernel_initializer=initializer, name="logits")(x)
