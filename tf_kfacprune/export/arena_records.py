"""Records of TensorFlow Lite Micro for a .tflite file; their sizes are `graph.runtime_records`."""

from __future__ import annotations

from tf_kfacprune.export.memory_plan import lifetimes
from tf_kfacprune.export.model_graph import FileGraph, FileOperation
from tf_kfacprune.graph import runtime_records as sizes

__all__ = ["record_bytes", "working_bytes"]

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")


def record_bytes(graph: FileGraph) -> int:
    """Bytes of the records that stay, of a file's main graph."""
    kernels = sum(_kernel(operation) for operation in graph.operations)
    channels = sum(_channels(graph, operation) for operation in graph.operations)
    return (
        sizes.FIXED
        + sizes.QUANTIZED * any(bool(tensor.scales) for tensor in graph.tensors)
        + sizes.TENSOR * len(graph.tensors)
        + sizes.OPERATION * len(graph.operations)
        + kernels
        + sizes.CHANNEL * channels
    )


def working_bytes(graph: FileGraph) -> int:
    """The most bytes that records and working memory take while a file is prepared."""
    records = record_bytes(graph)
    activations = len(lifetimes(graph).sizes)
    most = records + sizes.PLANNED + sizes.PLANNED_TENSOR * len(graph.tensors)
    most += sizes.PLANNED_ACTIVATION * activations
    later = 0  # records of the channels of operations that are prepared later
    for operation in reversed(graph.operations):
        scales = max((len(graph.tensors[i].scales) for i in operation.inputs if i >= 0), default=0)
        own = sizes.PREPARED if scales <= 1 else sizes.PREPARED_PER_CHANNEL + sizes.CHANNEL * scales
        most = max(most, records - later + own)
        later += sizes.CHANNEL * _channels(graph, operation)
    return most


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
