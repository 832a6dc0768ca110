"""Lets BatchNormalization forget the network that it saw before pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import tensorflow as tf

__all__ = ["forgetting_momentum"]


@dataclass
class _Own:
    """What a layer's momentum is outside all blocks, and how many blocks are open."""

    momentum: float
    blocks: int = 0


# The replicas of a MirroredStrategy are traced in turns: their blocks overlap without nesting.
_OPEN: WeakKeyDictionary[keras.Layer, _Own] = WeakKeyDictionary()


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
    steps = tf.cast(steps, "float32")
    cap = (1.0 + steps) / (10.0 + steps)
    for layer in layers:
        own = _OPEN.setdefault(layer, _Own(layer.momentum))
        own.blocks += 1
        dtype = keras.backend.result_type(layer.compute_dtype, "float32")  # of its statistics
        layer.momentum = tf.cast(tf.minimum(own.momentum, cap), dtype)
    try:
        yield
    finally:
        for layer in layers:
            own = _OPEN[layer]
            own.blocks -= 1
            if own.blocks == 0:
                layer.momentum = _OPEN.pop(layer).momentum
