"""The same function in operations for which runtimes have a kernel.

Keras repeats rows and columns in `UpSampling2D` with ``"nearest"``, which becomes five operations
of a file, two of them TILE, which TensorFlow Lite Micro lacks. To resize by a whole number of times
to the nearest pixel is the same, to the bit, and one operation that every runtime has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras

from tf_kfacprune.graph.rules.substitution import substituted

__all__ = ["in_runtime_form"]


@contextmanager
def in_runtime_form(model: keras.Model) -> Iterator[None]:
    """Within the block, layers of a model compute what they do by operations of runtimes.

    Args:
        model: The model; nested models and layers too.
    """
    with ExitStack() as stack:
        for layer in model._flatten_layers():
            if type(layer) is keras.layers.UpSampling2D and _repeats(layer):
                stack.enter_context(substituted(layer, call=_resized(layer)))
        yield


def _repeats(layer: keras.layers.UpSampling2D) -> bool:
    return layer.interpolation == "nearest" and layer.data_format == "channels_last"


def _resized(layer: keras.layers.UpSampling2D) -> Callable[[Any], Any]:
    import tensorflow as tf

    def call(inputs: Any) -> Any:
        known, size = inputs.shape[1:3], tf.shape(inputs)[1:3]
        factors = tuple(layer.size)
        result = tf.raw_ops.ResizeNearestNeighbor(images=inputs, size=size * factors)
        rows, columns = (n and n * factor for n, factor in zip(known, factors, strict=True))
        result.set_shape((inputs.shape[0], rows, columns, inputs.shape[3]))
        return result

    return call
