"""Lets BatchNormalization forget the network that it saw before pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

__all__ = ["forgetting_momentum"]


@contextmanager
def forgetting_momentum(model: keras.Model, steps: Any) -> Iterator[None]:
    """Caps the momentum of moving statistics at `(1 + steps) / (10 + steps)` inside the block.

    A momentum of 0.999, usual in `keras.applications`, remembers a thousand steps. After a network
    has been cut down, inference would go on with the statistics of neurons that are gone. With
    the cap an average starts anew and has its own momentum again when `steps` has grown enough.
    Layers that do not train keep their statistics, as always.

    Args:
        model: A model, called inside the block.
        steps: Steps since the network was changed, a scalar tensor.

    References:
        The cap is that of `tf.train.ExponentialMovingAverage(num_updates=...)`.
    """
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    own = [layer.momentum for layer in layers]
    steps = tf.cast(steps, "float32")
    cap = (1.0 + steps) / (10.0 + steps)
    try:
        for layer, momentum in zip(layers, own, strict=True):
            layer.momentum = tf.minimum(momentum, cap)
        yield
    finally:
        for layer, momentum in zip(layers, own, strict=True):
            layer.momentum = momentum
