"""What the converter makes of layers in the int8 file: kernels, tensors, names, working memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from keras import layers

from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.rules import Extent
from tf_kfacprune.graph.runtime_records import LISTS, SUM, WITH_SUMS

__all__ = [
    "FUSED",
    "KEEP_ROWS",
    "ON_ROWS",
    "Buffer",
    "Step",
    "activation_kernels",
    "activation_of",
    "constants_of",
    "is_known_activation",
    "kernel_of",
    "name_parts_of",
    "scratch_of",
]

FUSED = ("linear", "relu", "relu6")
KEEP_ROWS = ("sigmoid", "tanh")  # what is computed on images of one row, not on sequences
# Operations that stand for an activation function, each with the bytes of its entries.
_ACTIVATIONS = MappingProxyType(
    {
        "softmax": (("SOFTMAX", 1),),
        "sigmoid": (("LOGISTIC", 1),),
        "tanh": (("TANH", 1),),
        "hard_silu": (("HARD_SWISH", 1),),
        "silu": (("LOGISTIC", 1), ("MUL", 1)),
        "leaky_relu": (("LEAKY_RELU", 1),),
        "gelu": (("GELU", 1),),
        "elu": (("DEQUANTIZE", 4), ("ELU", 4), ("QUANTIZE", 1)),
    }
)
_KERNELS = (
    ("GlobalAveragePooling", "MEAN"),
    ("GlobalMaxPooling", "REDUCE_MAX"),
    ("AveragePooling", "AVERAGE_POOL_2D"),
    ("MaxPooling", "MAX_POOL_2D"),
    ("ZeroPadding", "PAD"),
    ("Cropping", "STRIDED_SLICE"),
    ("Permute", "TRANSPOSE"),
    ("UpSampling", "RESIZE_NEAREST_NEIGHBOR"),
    ("PReLU", "PRELU"),
    ("Add", "ADD"),
    ("Concatenate", "CONCATENATION"),
    ("Multiply", "MUL"),
    ("Flatten", "RESHAPE"),
    ("Reshape", "RESHAPE"),
)
# Tensors that the file holds for an operation: axes, shapes, margins.
_CONSTANTS = MappingProxyType(
    {"": 1, "MEAN": 1, "REDUCE_MAX": 1, "RESHAPE": 1, "PAD": 1, "TRANSPOSE": 1}
    | {"RESIZE_BILINEAR": 1, "RESIZE_NEAREST_NEIGHBOR": 1, "PRELU": 1, "STRIDED_SLICE": 3}
)
# Where names have more parts than there are tensors: they are those of several layers.
_NAMED_BY_PARTS = MappingProxyType({"PRELU": 7})
_ADDED_ROWS = 8
# Layers that slide along the one axis of a sequence, which run on an image of one row.
ON_ROWS = (
    *(layers.Conv1D, layers.DepthwiseConv1D, layers.SeparableConv1D, layers.Conv1DTranspose),
    *(layers.MaxPooling1D, layers.AveragePooling1D),
)
_ALIGNMENT = 16


@dataclass(eq=False, frozen=True)
class Buffer:
    """A tensor of activations, or working memory of an operation.

    Attributes:
        size: Bytes, as a product of extents.
        maker: The call that writes it; None for an input.
    """

    size: tuple[Extent | float, ...]
    maker: Call | None

    @property
    def padding(self) -> float:
        """What rounding up to 16 bytes adds at most."""
        fixed = math.prod(int(extent) for extent in self.size if isinstance(extent, int | float))
        return 0.0 if fixed % _ALIGNMENT == 0 else _ALIGNMENT - 1.0


@dataclass(eq=False, frozen=True, kw_only=True)
class Step:
    """One operation.

    Attributes:
        call: The call that it belongs to.
        kernel: Name of the operation in the schema, empty for one that is not told apart.
        reads: Activations that it reads.
        writes: The activation that it writes.
        constants: Number of tensors that the file holds for it.
        channels: Number of channels whose weights have a scale each, or None.
        name_parts: Number of parts that the names of its tensors are made of.
        scratch: Working memory that it asks for while it runs.
        zeros: Number of zeros that the file holds as a bias where the layer has none, or None.
    """

    call: Call
    kernel: str
    reads: tuple[Buffer, ...]
    writes: Buffer
    constants: int
    name_parts: int
    channels: Extent | None = None
    scratch: tuple[Buffer, ...] = ()
    zeros: Extent | None = None


def activation_of(operation: Any) -> str:
    """Name of the activation function that a layer without weights is, or an empty string."""
    if isinstance(operation, layers.Softmax):
        return "softmax"
    if isinstance(operation, layers.ELU):
        return "elu"
    if isinstance(operation, layers.LeakyReLU):
        return "leaky_relu"
    if isinstance(operation, layers.Activation):
        return getattr(operation.activation, "__name__", "")
    return ""


def activation_kernels(name: str) -> tuple[tuple[str, int], ...] | None:
    """Kernels that an activation function becomes, each with the bytes of its entries.

    Returns:
        None for a function of which that is not known.
    """
    return _ACTIVATIONS.get(name)


def is_known_activation(name: str) -> bool:
    """Whether it is known what an activation function becomes."""
    return name in FUSED or name in _ACTIVATIONS


def kernel_of(operation: Any) -> str:
    """The kernel of a layer or operation without weights, empty for one that is not told apart."""
    if getattr(operation, "interpolation", "") == "bilinear":
        return "RESIZE_BILINEAR"
    name = type(operation).__name__
    return next((kernel for start, kernel in _KERNELS if name.startswith(start)), "")


def constants_of(kernel: str) -> int:
    """How many tensors the file holds for a kernel without weights."""
    return _CONSTANTS.get(kernel, 0)


def name_parts_of(kernel: str, on_rows: bool) -> int:
    """Number of parts in the names of a kernel's tensors, which may be those of several layers."""
    if kernel == "ADD" and on_rows:
        return _ADDED_ROWS
    return _NAMED_BY_PARTS.get(kernel, 1 + constants_of(kernel))


def scratch_of(call: Call, kernel: str, written: Buffer) -> tuple[Buffer, ...]:
    """Working memory that an operation asks for while it runs."""
    sums = [Buffer((SUM, *written.size), call)] if kernel in WITH_SUMS else []
    return (*sums, *(Buffer((size,), call) for size in LISTS.get(kernel, ())))
