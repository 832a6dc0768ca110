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

Channels are two lists of 4 bytes for each, both rounded up to 16.

Some kernels ask for working memory while they run, which lies among the activations: 4 bytes for
each entry of the result where they sum up int8 values, and lists of 16 bytes.

The records grow while the file is prepared, and beside them lie, for a time, what the preparation
of one operation needs (288 bytes; with a scale per channel 336, and 4 for each of the kernel's and
of the bias'), and then lists for planning (48 bytes, 40 for each tensor and 28 for each activation;
working memory counts as both).
"""

from __future__ import annotations

from types import MappingProxyType

__all__ = [
    "CHANNEL",
    "CHANNEL_ROUNDING",
    "FIXED",
    "KERNELS",
    "LISTS",
    "OPERATION",
    "OTHER_KERNEL",
    "OUTPUT",
    "PLANNED",
    "PLANNED_ACTIVATION",
    "PLANNED_TENSOR",
    "PREPARED",
    "PREPARED_PER_CHANNEL",
    "QUANTIZED",
    "SUM",
    "TENSOR",
    "WITH_SUMS",
    "ZERO_POINT",
]

FIXED, QUANTIZED, TENSOR, OPERATION, CHANNEL = 648, 68, 24, 64, 8
ZERO_POINT = 4
OUTPUT = 92  # every output beside the first
CHANNEL_ROUNDING = 24  # the most that rounding up adds for all channels of an operation
PREPARED, PREPARED_PER_CHANNEL = 288, 336
PLANNED, PLANNED_TENSOR, PLANNED_ACTIVATION = 48, 40, 28

# Data of kernels, by the name of the operation in the schema.
KERNELS = MappingProxyType(
    {
        "ADD": 64,
        "AVERAGE_POOL_2D": 72,
        "CONCATENATION": 87,
        "CONV_2D": 112,
        "DEPTHWISE_CONV_2D": 106,
        "DEQUANTIZE": 32,
        "ELU": 256,
        "FULLY_CONNECTED": 111,
        "HARD_SWISH": 31,
        "LEAKY_RELU": 35,
        "LOGISTIC": 15,
        "MAX_POOL_2D": 77,
        "MEAN": 73,
        "MUL": 49,
        "NEG": 0,
        "PAD": 71,
        "PRELU": 32,
        "QUANTIZE": 32,
        "REDUCE_MAX": 71,
        "RESHAPE": 37,
        "RESIZE_BILINEAR": 4,
        "RESIZE_NEAREST_NEIGHBOR": 4,
        "RSQRT": 144,
        "SOFTMAX": 82,
        "SQUARE": 0,
        "SQUARED_DIFFERENCE": 104,
        "STRIDED_SLICE": 116,
        "TANH": 17,
        "TRANSPOSE": 0,
        "TRANSPOSE_CONV": 119,
    }
)
OTHER_KERNEL = 80

# Working memory of kernels: bytes for each entry of the result, and of lists.
SUM = 4
WITH_SUMS = ("MEAN", "TRANSPOSE_CONV")
LISTS = MappingProxyType({"MEAN": (16, 16), "REDUCE_MAX": (16, 16)})
