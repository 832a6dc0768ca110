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

from types import MappingProxyType

__all__ = [
    "CHANNEL",
    "FIXED",
    "KERNELS",
    "OPERATION",
    "OTHER_KERNEL",
    "PLANNED",
    "PLANNED_ACTIVATION",
    "PLANNED_TENSOR",
    "PREPARED",
    "PREPARED_PER_CHANNEL",
    "QUANTIZED",
    "TENSOR",
]

FIXED, QUANTIZED, TENSOR, OPERATION, CHANNEL = 648, 68, 24, 64, 8
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
        "FULLY_CONNECTED": 111,
        "HARD_SWISH": 31,
        "LOGISTIC": 15,
        "MAX_POOL_2D": 77,
        "MEAN": 73,
        "MUL": 49,
        "PAD": 71,
        "RESHAPE": 37,
        "SOFTMAX": 82,
        "TANH": 17,
        "TRANSPOSE_CONV": 119,
    }
)
OTHER_KERNEL = 80
