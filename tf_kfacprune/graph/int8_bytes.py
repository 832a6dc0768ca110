"""Bytes of the full int8 `.tflite` file: what lies in the flash memory of a microcontroller.

One byte per weight and four per bias, 12 bytes for the scale and zero point of each channel of a
kernel and again of its bias, and the records of operations and tensors, with a name for each
tensor. The sizes of records were fitted to 34 files of the converter of TensorFlow 2.21, batch size
1, and then raised by 16 bytes for each tensor, so that files of the networks of the zoo are no
larger than predicted. The entry that says where activations lie (`export.memory_plan`) is counted
for every file: one without it is some hundred bytes smaller than predicted, 3 % of 18 kB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from keras import layers

from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.file_bytes import FileBytes
from tf_kfacprune.graph.int8_operations import Step
from tf_kfacprune.graph.rules import Extent

__all__ = ["Int8Bytes"]

_FILE = 540  # header, signature, and about three kinds of operations
_PLAN, _PLANNED = 200, 8  # the entry, and for each tensor its place and one more for its buffer
_STEP, _CONSTANT = 168, 107  # an operation with its result, and a tensor that the file holds
_CHANNEL = 12  # scale and zero point of a channel
_BIAS = 4
# Parts of names, "model/layer/operation": characters beside the names of model and layer.
_NAME_PART = 17


class Int8Bytes:
    """What operations and layers contribute to the file, as products of extents.

    Args:
        channels: The channel graph.
    """

    def __init__(self, channels: ChannelGraph) -> None:
        self._content = FileBytes(channels)
        self._name = len(channels.graph.model.name)
        self._channels = channels

    def of_file(self) -> Iterator[list[Extent]]:
        """What does not belong to a layer: the frame, and the choice of features."""
        yield [_FILE + _PLAN]
        for producer in self._channels.picked:
            if producer.layer is None:  # else it is one of the steps
                yield [_STEP + _CONSTANT]
            yield [4, producer.labels]

    def of_step(self, step: Step) -> Iterator[list[Extent]]:
        """Bytes of an operation, its tensors, their names, and scales per channel."""
        part = self._name + len(step.call.path) + _NAME_PART
        tensors = 1 + step.constants
        yield [_STEP + step.constants * _CONSTANT + tensors * _PLANNED + step.name_parts * part]
        if step.channels is not None:
            yield [2 * _CHANNEL, step.channels]
        if step.zeros is not None:
            yield [_BIAS, step.zeros]

    def of_weights(self, call: Call, weights: Sequence[list[Extent]]) -> Iterator[list[Extent]]:
        """Stored values of a layer, given one product of extents for each of its weights.

        A vector is a bias, four bytes for each value, which a convolution gets if it has none.
        """
        if isinstance(call.operation, layers.BatchNormalization):
            if not self._content.is_folded(call) and weights:
                yield [2, *weights[0]]
            return
        for product in self._content.of_weights(call, weights):
            yield [_BIAS if len(product) == 2 else 1, *product[1:]]

    def of_constant(self, call: Call) -> Iterator[list[Extent]]:
        """What `Add` stores in place of an operand that is the same at every position."""
        (_, product) = self._content.of_constant(call)
        yield [_CONSTANT]
        yield [1, *product[1:]]
