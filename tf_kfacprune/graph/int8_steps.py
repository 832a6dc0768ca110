"""The operations of the full int8 `.tflite` file of a model, in the order in which they run.

The converter folds BatchNormalization into the weighted layer before it, fuses ReLUs, and drops
dropout and gates. What is left of each call are operations, each with one result; an activation
that cannot be fused is an operation of its own, and so is the choice of flattened features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import layers

from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.file_bytes import FileBytes
from tf_kfacprune.graph.rules import ContractionRule, Extent, rule_for
from tf_kfacprune.graph.rules.base import extents
from tf_kfacprune.graph.rules.contractions import ConvRule, ConvTransposeRule, DepthwiseConvRule

__all__ = ["Buffer", "Int8Steps", "Step"]

_FUSED = ("linear", "relu", "relu6")
_ACTIVATIONS = {
    "softmax": "SOFTMAX",
    "sigmoid": "LOGISTIC",
    "tanh": "TANH",
    "hard_silu": "HARD_SWISH",
}
_WINDOWS = (
    ("GlobalAveragePooling", "MEAN"),
    ("GlobalMaxPooling", ""),
    ("AveragePooling", "AVERAGE_POOL_2D"),
    ("MaxPooling", "MAX_POOL_2D"),
    ("ZeroPadding", "PAD"),
    ("Add", "ADD"),
    ("Concatenate", "CONCATENATION"),
    ("Multiply", "MUL"),
    ("Flatten", "RESHAPE"),
    ("Reshape", "RESHAPE"),
)
_ALIGNMENT = 16


@dataclass(eq=False, frozen=True)
class Buffer:
    """A tensor of activations.

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


@dataclass(eq=False, frozen=True)
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
    """

    call: Call
    kernel: str
    reads: tuple[Buffer, ...]
    writes: Buffer
    constants: int
    channels: Extent | None
    name_parts: int


class Int8Steps:
    """All operations of the file.

    Attributes:
        inputs: Activations that are given, without the features that are pruned.
        selections: For inputs whose features may be pruned: all features, and those that stay.
        outputs: Activations that are asked for.
        steps: The operations.

    Args:
        channels: The channel graph.
        is_dropped: Whether a call leaves nothing in the file (a gate).
    """

    def __init__(self, channels: ChannelGraph, is_dropped: Callable[[Call], bool]) -> None:
        self._channels = channels
        self._flow = channels.flow
        self._content = FileBytes(channels)
        self.inputs: list[Buffer] = []
        self.selections: list[tuple[Buffer, Buffer]] = []
        self.steps: list[Step] = []
        self._buffers: dict[Value, Buffer] = {}
        self._picked: dict[tuple[Value, int], Buffer] = {}
        self._normalized = {
            call.inputs[0]
            for call in channels.graph.calls
            if isinstance(call.operation, layers.BatchNormalization)
            and self._content.is_folded(call)
        }
        for call in channels.graph.calls:
            if isinstance(call.operation, layers.InputLayer):
                self._give(call.outputs, None)
            elif is_dropped(call) or self._leaves_nothing(call):
                self._buffers[call.outputs[0]] = self._read(call, call.inputs[0])
            else:
                self._run(call)
        self.outputs = [self._buffer(value) for value in channels.graph.outputs]

    def _leaves_nothing(self, call: Call) -> bool:
        operation = call.operation
        if isinstance(operation, layers.BatchNormalization):
            return self._content.is_folded(call)
        if isinstance(operation, layers.Flatten):  # a Dense layer reads it as it is
            positions = call.inputs[0].shape[1:-1]
            return bool(positions) and all(size == 1 for size in positions)
        return rule_for(operation).is_absent or self._content.is_fused(call)

    def _buffer(self, value: Value) -> Buffer:
        """The activation of a value; one that nothing made is given."""
        if value not in self._buffers:
            self._give((value,), None)
        return self._buffers[value]

    def _read(self, call: Call, value: Value) -> Buffer:
        """What a call reads of a value: all of it, or the flattened features that it picks."""
        axis, labels = self._flow.selections.get((call, value), (0, np.zeros(0, int)))
        if not self._is_prunable(labels) or value in self._flow.raw:
            return self._buffer(value)
        if (value, axis) not in self._picked:
            picked = Buffer((1, labels), call)
            self._picked[value, axis] = picked
            self._append(call, "", (self._buffer(value),), picked, 1, None, 2)
        return self._picked[value, axis]

    def _give(self, values: tuple[Value, ...], maker: Call | None) -> None:
        for value in values:
            size = extents(value, self._flow, range(1, len(value.shape)))
            each = 1 if "float" in value.dtype or "int8" in value.dtype else 4
            self._buffers[value] = Buffer((each, *size), maker)
            if maker is None:
                self.inputs.append(self._buffers[value])
                if any(self._is_prunable(extent) for extent in size):
                    everything = math.prod(n or 1 for n in self._flow.sizes(value)[1:])
                    given = Buffer((each, everything), None)
                    self.selections.append((given, self._buffers[value]))

    def _is_prunable(self, extent: Extent) -> bool:
        if not isinstance(extent, np.ndarray):
            return False
        return bool((self._channels.neurons(extent) < self._channels.num_neurons).any())

    def _run(self, call: Call) -> None:
        operation, rule = call.operation, rule_for(call.operation)
        reads = tuple(self._read(call, value) for value in call.inputs)
        self._give(call.outputs, call)
        written = self._buffers[call.outputs[0]]
        activation = getattr(getattr(operation, "activation", None), "__name__", "linear")
        is_weighted = isinstance(rule, ContractionRule | DepthwiseConvRule)
        if not is_weighted:
            kernel = _kernel(operation, activation)
            constants = int(kernel in ("", "MEAN", "RESHAPE", "PAD"))
            self._append(call, kernel, reads, written, constants, None, 1 + constants)
            return
        parts = 1 + int(activation != "linear" or call.outputs[0] in self._normalized)
        kernels = max(len(list(rule.macs(call, self._flow))), 1)
        for _ in range(kernels - 1):  # as large as the result: what lies between is not known
            between = Buffer(written.size, call)
            self._append(call, "", reads, between, 2, None, parts)
            reads = (between,)
        fused = activation in _FUSED
        result = written if fused else Buffer(written.size, call)
        self._append(call, *self._weighted(call, reads, result))
        if not fused:
            kernel = _ACTIVATIONS.get(activation, "")
            self._append(call, kernel, (result,), written, 0, None, 1)

    def _append(self, call: Call, kernel: str, *details: Any) -> None:
        self.steps.append(Step(call, kernel, *details))

    def _weighted(self, call: Call, reads: tuple[Buffer, ...], result: Buffer) -> tuple[Any, ...]:
        """Kernel, tensors, channels and names of an operation with weights."""
        operation, rule = call.operation, rule_for(call.operation)
        value = call.outputs[0]
        channels: Extent | None = self._flow.roles(operation).get("out")
        if channels is None:
            channels = value.shape[-1] or 1
        has_bias = getattr(operation, "bias", None) is not None
        is_normalized = value in self._normalized
        is_fused = self._content.is_read_by_fused(value)
        if isinstance(rule, DepthwiseConvRule):
            kernel, own = "DEPTHWISE_CONV_2D", 3 if has_bias else 1
            own += 4 * is_normalized
            parts = 2 * (own + is_fused) + (own - 2 if is_normalized else 1)
        elif isinstance(rule, ConvRule | ConvTransposeRule):
            is_transposed = isinstance(rule, ConvTransposeRule)
            kernel, own = "TRANSPOSE_CONV" if is_transposed else "CONV_2D", 3 if has_bias else 1
            own += (4 if has_bias else 2) * is_normalized
            parts = 2 * (own + is_fused) + 1
        else:
            kernel = "FULLY_CONNECTED"
            parts = (1 + is_fused) + 1 + (2 + 2 * is_normalized + is_fused)
        constants = 2 + (kernel == "TRANSPOSE_CONV")
        return kernel, reads, result, constants, channels, parts


def _kernel(operation: Any, activation: str) -> str:
    if isinstance(operation, layers.Softmax):
        return "SOFTMAX"
    if isinstance(operation, layers.Activation):
        return _ACTIVATIONS.get(activation, "")
    name = type(operation).__name__
    return next((kernel for start, kernel in _WINDOWS if name.startswith(start)), "")
