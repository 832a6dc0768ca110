"""Records of TensorFlow Lite Micro for a .tflite file; their sizes are `graph.runtime_records`."""

from __future__ import annotations

from tf_kfacprune.export.memory_plan import aligned, lifetimes
from tf_kfacprune.export.model_graph import FileGraph, FileOperation
from tf_kfacprune.graph import runtime_records as sizes

__all__ = ["record_bytes", "working_bytes"]

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")


def record_bytes(graph: FileGraph) -> int:
    """Bytes of the records that stay, of a file's main graph."""
    kernels = sum(_kernel(operation) for operation in graph.operations)
    channels = sum(_channel_bytes(graph, operation) for operation in graph.operations)
    return (
        sizes.FIXED
        + sizes.QUANTIZED * any(bool(tensor.scales) for tensor in graph.tensors)
        + sizes.TENSOR * len(graph.tensors)
        + sizes.OPERATION * len(graph.operations)
        + kernels
        + channels
        + sizes.OUTPUT * max(len(graph.outputs) - 1, 0)
    )


def working_bytes(graph: FileGraph) -> int:
    """The most bytes that records and working memory take while a file is prepared."""
    records = record_bytes(graph)
    living = lifetimes(graph).sizes
    tensors = len(graph.tensors) + sum(number < 0 for number in living)  # with working memory
    most = records + sizes.PLANNED + sizes.PLANNED_TENSOR * tensors
    most += sizes.PLANNED_ACTIVATION * len(living)
    later = 0  # records of the channels of operations that are prepared later
    for operation in reversed(graph.operations):
        scales = [len(graph.tensors[i].scales) for i in operation.inputs if i >= 0]
        many = sum(count for count in scales if count > 1)  # of the kernel, and of its bias
        own = sizes.PREPARED_PER_CHANNEL + sizes.ZERO_POINT * many if many else sizes.PREPARED
        most = max(most, records - later + own)
        later += _channel_bytes(graph, operation)
    return most


def _channel_bytes(graph: FileGraph, operation: FileOperation) -> int:
    """Two lists, each rounded up to 16 bytes."""
    return 2 * aligned(sizes.CHANNEL // 2 * _channels(graph, operation))


def _channels(graph: FileGraph, operation: FileOperation) -> int:
    """Channels for which the kernel keeps a scale: a convolution does in float32, too."""
    if operation.operator in _CONVOLUTIONS:
        return graph.tensors[operation.outputs[0]].shape[-1]
    if operation.operator == "FULLY_CONNECTED":
        scales = len(graph.tensors[operation.inputs[1]].scales)
        return scales if scales > 1 else 0
    return 0


def _kernel(operation: FileOperation) -> int:
    return sizes.KERNELS.get(operation.operator, sizes.OTHER_KERNEL)
