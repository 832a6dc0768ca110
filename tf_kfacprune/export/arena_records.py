"""What TensorFlow Lite Micro keeps in the tensor arena beside the activations.

Sizes of its records on a 64-bit machine, where pointers are twice as long as on most
microcontrollers. They were fitted to what the runtime reports (`print_allocations`, tflite-micro of
October 2026) for 68 files of one to 32 operations, and come within 20 bytes of each:

| record | bytes |
| --- | --- |
| interpreter, inputs and outputs | 648, and 68 more if they are quantized |
| tensor | 24 |
| operation | 64, and the data of its kernel: 15 to 119 by its kind |
| channel of a convolution, or of a Dense layer with a scale for each | 8 |

The records grow while the file is prepared, and beside them lie, for a time, what the preparation
of one operation needs (288 bytes; with a scale per channel 336, and 8 for each of them), and then
lists for planning (48 bytes, 40 for each tensor and 28 for each activation).
"""

from __future__ import annotations

from tf_kfacprune.export.memory_plan import lifetimes
from tf_kfacprune.export.model_graph import FileGraph, FileOperation

__all__ = ["record_bytes", "working_bytes"]

_FIXED, _QUANTIZED, _TENSOR, _OPERATION, _CHANNEL = 648, 68, 24, 64, 8
_PREPARED, _PREPARED_PER_CHANNEL = 288, 336
_PLANNED, _PLANNED_TENSOR, _PLANNED_ACTIVATION = 48, 40, 28

_CONV, _DEPTHWISE, _TRANSPOSED, _DENSE = 3, 4, 67, 9
# Data of kernels by the number of the operation in the schema: ADD, AVERAGE_POOL_2D, CONCATENATION,
# CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED, LOGISTIC, MAX_POOL_2D, MUL, RESHAPE, SOFTMAX, PAD,
# MEAN, TRANSPOSE_CONV, TANH, HARD_SWISH; and for operations of other kinds.
_KERNELS = {
    0: 64,
    1: 72,
    2: 87,
    _CONV: 112,
    _DEPTHWISE: 106,
    _DENSE: 111,
    14: 15,
    17: 77,
    18: 49,
    22: 37,
    25: 82,
    34: 71,
    40: 73,
    _TRANSPOSED: 119,
    28: 17,
    117: 31,
}
_OTHER_KERNEL = 80


def record_bytes(graph: FileGraph) -> int:
    """Bytes of the records that stay, of a file's main graph."""
    kernels = sum(_KERNELS.get(operation.code, _OTHER_KERNEL) for operation in graph.operations)
    channels = sum(_channels(graph, operation) for operation in graph.operations)
    return (
        _FIXED
        + _QUANTIZED * any(tensor.scales for tensor in graph.tensors)
        + _TENSOR * len(graph.tensors)
        + _OPERATION * len(graph.operations)
        + kernels
        + _CHANNEL * channels
    )


def working_bytes(graph: FileGraph) -> int:
    """The most bytes that records and working memory take while a file is prepared."""
    records = record_bytes(graph)
    activations = len(lifetimes(graph).sizes)
    most = records + _PLANNED + _PLANNED_TENSOR * len(graph.tensors)
    most += _PLANNED_ACTIVATION * activations
    later = 0  # records of the channels of operations that are prepared later
    for operation in reversed(graph.operations):
        scales = max((graph.tensors[i].scales for i in operation.inputs if i >= 0), default=0)
        own = _PREPARED if scales <= 1 else _PREPARED_PER_CHANNEL + _CHANNEL * scales
        most = max(most, records - later + own)
        later += _CHANNEL * _channels(graph, operation)
    return most


def _channels(graph: FileGraph, operation: FileOperation) -> int:
    """Channels for which the kernel keeps a scale: a convolution does in float32, too."""
    if operation.code in (_CONV, _DEPTHWISE, _TRANSPOSED):
        return graph.tensors[operation.outputs[0]].shape[-1]
    if operation.code == _DENSE:
        scales = graph.tensors[operation.inputs[1]].scales
        return scales if scales > 1 else 0
    return 0
