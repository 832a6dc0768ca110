"""The same function in operations for which runtimes have a kernel.

Keras repeats rows and columns in `UpSampling2D` with ``"nearest"``, which becomes five operations
of a file, two of them TILE, which TensorFlow Lite Micro lacks. To resize by a whole number of times
to the nearest pixel is the same, to the bit, and one operation that every runtime has.

The bias of a `Conv1D` with a single filter is added to a sequence, by an operation of its own
between two RESHAPEs. Added to the image of one row that the kernel works on, it is no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras import ops

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
            if type(layer) is keras.layers.Conv1D and _has_bias_of_one(layer):
                stack.enter_context(substituted(layer, call=_convolved(layer)))
        yield


def _repeats(layer: keras.layers.UpSampling2D) -> bool:
    return layer.interpolation == "nearest" and layer.data_format == "channels_last"


def _has_bias_of_one(layer: keras.layers.Conv1D) -> bool:
    is_plain = layer.quantization_mode is None and not getattr(layer, "lora_enabled", False)
    is_last = layer.data_format == "channels_last"
    return layer.filters == 1 and layer.bias is not None and is_plain and is_last


def _convolved(layer: keras.layers.Conv1D) -> Callable[[Any], Any]:
    def call(inputs: Any) -> Any:
        (stride,), (dilation,), padding = layer.strides, layer.dilation_rate, layer.padding
        if padding == "causal":
            margin = dilation * (layer.kernel_size[0] - 1)
            inputs, padding = ops.pad(inputs, [[0, 0], [margin, 0], [0, 0]]), "valid"
        images = ops.conv(
            ops.expand_dims(inputs, 1),
            ops.expand_dims(ops.convert_to_tensor(layer.kernel), 0),
            strides=(1, stride),
            padding=padding,
            dilation_rate=(1, dilation),
        )
        result = layer.activation(images + layer.bias)
        return ops.squeeze(result, 1)

    return call


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
