"""The operations of the full int8 `.tflite` file of a model, in the order in which they run.

The converter folds BatchNormalization into the weighted layer before it, fuses ReLUs, and drops
dropout and gates. What is left of each call are operations, each with one result; an activation
that cannot be fused is an operation of its own, and so is the choice of flattened features. Layers
that slide along one axis do so over images of one row: a RESHAPE raises a sequence to an image
where the first of them reads it, and another one lowers what the last of them writes.
Normalizations are taken apart (`int8_normalizations`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
from keras import layers

from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.file_bytes import FileBytes
from tf_kfacprune.graph.int8_normalizations import EACH, NORMALIZATIONS, PARAMETERS
from tf_kfacprune.graph.int8_operations import (
    FUSED,
    KEEP_ROWS,
    ON_ROWS,
    Buffer,
    Step,
    activation_kernels,
    activation_of,
    constants_of,
    kernel_of,
    name_parts_of,
    scratch_of,
)
from tf_kfacprune.graph.rules import ContractionRule, Extent, rule_for
from tf_kfacprune.graph.rules.base import extents
from tf_kfacprune.graph.rules.channelwise import BatchNormalizationRule
from tf_kfacprune.graph.rules.contractions import (
    ConvRule,
    ConvTransposeRule,
    DepthwiseConvRule,
    SeparableConvRule,
)
from tf_kfacprune.graph.rules.merging import MergeRule
from tf_kfacprune.graph.rules.reshaping import IndexRule

__all__ = ["Int8Steps"]

# Parts of names where a sequence is normalized behind an activation.
_NORMALIZED_ROWS = MappingProxyType({"MUL": 11, "ADD": 16})


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
        self._images: dict[Value, Buffer] = {}  # sequences, as images of one row
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
                self._hand_on(call)
            else:
                self._run(call)
        self.outputs = [self._buffer(value) for value in channels.graph.outputs]

    # ---- what operations read

    def _leaves_nothing(self, call: Call) -> bool:
        operation = call.operation
        if isinstance(operation, layers.BatchNormalization):
            return self._content.is_folded(call)
        if isinstance(operation, layers.Flatten) and self._content.is_read_by_dense(call):
            positions = call.inputs[0].shape[1:-1]  # a Dense layer reads it as it is
            return bool(positions) and all(size == 1 for size in positions)
        return rule_for(operation).is_absent or self._content.is_fused(call)

    def _hand_on(self, call: Call) -> None:
        """A call that leaves nothing: its result is what it reads."""
        value, result = call.inputs[0], call.outputs[0]
        if value in self._images and value not in self._buffers:
            self._images[result] = self._images[value]
        else:
            self._buffers[result] = self._read(call, value)

    def _buffer(self, value: Value) -> Buffer:
        """The activation of a value; one that nothing made is given."""
        if value not in self._buffers:
            if value in self._images:
                call, image = self._channels.graph.makers[value], self._images[value]
                self._buffers[value] = self._reshaped(call, image, name_parts=5)
            else:
                self._give((value,), None)
        return self._buffers[value]

    def _image(self, call: Call, value: Value) -> Buffer:
        """The activation of a sequence as an image of one row."""
        if value not in self._images:
            self._images[value] = self._reshaped(call, self._read(call, value), name_parts=3)
        return self._images[value]

    def _reshaped(self, call: Call, buffer: Buffer, name_parts: int) -> Buffer:
        result = Buffer(buffer.size, call)
        self._append(call, "RESHAPE", (buffer,), result, constants=1, name_parts=name_parts)
        return result

    def _read(self, call: Call, value: Value) -> Buffer:
        """What a call reads of a value: all of it, or the flattened features that it picks."""
        axis, labels = self._flow.selections.get((call, value), (0, np.zeros(0, int)))
        if not self._is_prunable(labels) or value in self._flow.raw:
            return self._buffer(value)
        if (value, axis) not in self._picked:
            picked = Buffer((1, labels), call)
            self._picked[value, axis] = picked
            self._append(call, "", (self._buffer(value),), picked, constants=1, name_parts=2)
        return self._picked[value, axis]

    def _give(self, values: tuple[Value, ...], maker: Call | None) -> None:
        for value in values:
            self._buffers[value] = self._activation(value, maker)
            if maker is None:
                size = self._buffers[value].size
                self.inputs.append(self._buffers[value])
                if any(self._is_prunable(extent) for extent in size[1:]):
                    everything = math.prod(n or 1 for n in self._flow.sizes(value)[1:])
                    given = Buffer((size[0], everything), None)
                    self.selections.append((given, self._buffers[value]))

    def _activation(self, value: Value, maker: Call | None) -> Buffer:
        size = extents(value, self._flow, range(1, len(value.shape)))
        each = 1 if "float" in value.dtype or "int8" in value.dtype else 4
        return Buffer((each, *size), maker)

    def _is_prunable(self, extent: Extent | float) -> bool:
        if not isinstance(extent, np.ndarray):
            return False
        return bool((self._channels.neurons(extent) < self._channels.num_neurons).any())

    # ---- what stands for a call

    def _run(self, call: Call) -> None:
        operation, rule = call.operation, rule_for(call.operation)
        name = type(operation).__name__
        if isinstance(rule, ContractionRule | DepthwiseConvRule):
            self._run_weighted(call)
        elif name in NORMALIZATIONS:
            self._run_parts(call)
        else:
            is_image = isinstance(operation, ON_ROWS) or self._stays_image(call)
            reads = tuple(
                self._image(call, value)
                if is_image or (isinstance(rule, IndexRule) and value in self._images)
                else self._read(call, value)
                for value in call.inputs
            )
            self._write(call, self._run_plain(call, reads), is_image)

    def _stays_image(self, call: Call) -> bool:
        """Whether a call works entry by entry on images of one row; most go back to sequences."""
        rule = rule_for(call.operation)
        if isinstance(rule, BatchNormalizationRule):
            works_so = self._content.is_read_once(call.inputs[0])
        else:
            works_so = isinstance(rule, MergeRule) or activation_of(call.operation) in KEEP_ROWS
        images = (v in self._images and v not in self._buffers for v in call.inputs)
        return works_so and bool(call.inputs) and all(images)

    def _write(self, call: Call, buffer: Buffer, is_image: bool) -> None:
        (self._images if is_image else self._buffers)[call.outputs[0]] = buffer
        self._give(call.outputs[1:], call)

    def _append(
        self, call: Call, kernel: str, reads: tuple[Buffer, ...], writes: Buffer, **details: Any
    ) -> None:
        step = Step(call=call, kernel=kernel, reads=reads, writes=writes, **details)
        self.steps.append(step)

    def _run_plain(self, call: Call, reads: tuple[Buffer, ...]) -> Buffer:
        """An operation without weights, or the operations of an activation function."""
        if activation := activation_of(call.operation):
            if activation_kernels(activation):
                return self._activated(call, activation, reads[0])
        elif isinstance(call.operation, layers.BatchNormalization):
            reads = (self._entrywise(call, "MUL", reads),)
            return self._entrywise(call, "ADD", reads)
        kernel = kernel_of(call.operation)
        written = self._activation(call.outputs[0], call)
        while kernel == "ADD" and len(reads) > 2:  # two at a time
            first = Buffer(written.size, call)
            self._append(call, kernel, reads[:2], first, constants=0, name_parts=4)
            reads = (first, *reads[2:])
        self._append(
            call,
            kernel,
            reads,
            written,
            constants=constants_of(kernel),
            name_parts=name_parts_of(kernel, call.inputs[0] in self._images),
            scratch=scratch_of(call, kernel, written),
        )
        return written

    def _entrywise(self, call: Call, kernel: str, reads: tuple[Buffer, ...]) -> Buffer:
        """A product or a sum with one number per channel."""
        written = Buffer(reads[0].size, call)
        parts = _NORMALIZED_ROWS[kernel] if call.inputs[0] in self._images else 4
        self._append(call, kernel, reads, written, constants=1, name_parts=parts)
        return written

    def _activated(self, call: Call, activation: str, buffer: Buffer) -> Buffer:
        """The operations of an activation function."""
        is_named_at_length = isinstance(call.operation, ON_ROWS) or activation == "hard_silu"
        read, parts = buffer, 5 if is_named_at_length else 1
        for kernel, width in activation_kernels(activation) or (("", 1),):
            written = Buffer((width, *buffer.size[1:]), call)
            reads = (buffer, read) if kernel == "MUL" else (read,)
            self._append(call, kernel, reads, written, constants=0, name_parts=parts)
            read = written
        return read

    def _run_parts(self, call: Call) -> None:
        """A normalization, which is taken apart."""
        value = call.outputs[0]
        whole = self._activation(value, call).size[1:]
        sizes = {PARAMETERS: whole[-1:], EACH: self._means(call)}
        found = {"x": self._read(call, call.inputs[0])}
        for part in NORMALIZATIONS[type(call.operation).__name__]:
            written = Buffer((part.width, *sizes.get(part.shape, whole)), call)
            self._append(
                call,
                part.kernel,
                tuple(found[name] for name in part.reads),
                written,
                constants=part.constants,
                name_parts=1 + part.constants,
                scratch=scratch_of(call, part.kernel, written),
            )
            found[part.writes] = written
        self._buffers[value] = written

    def _means(self, call: Call) -> tuple[Extent, ...]:
        """Number of means that a normalization takes, as a product."""
        layer, value = call.operation, call.inputs[0]
        if isinstance(layer, layers.GroupNormalization):
            return (layer.groups,)
        axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        rank = len(value.shape)
        over = {axis % rank for axis in axes}
        return tuple(extents(value, self._flow, [k for k in range(1, rank) if k not in over]))

    def _run_weighted(self, call: Call) -> None:
        """An operation with weights, what precedes it, and its activation."""
        operation, rule = call.operation, rule_for(call.operation)
        is_image = isinstance(operation, ON_ROWS)
        reads = tuple(self._read_weighted(call, value, is_image) for value in call.inputs)
        activation = getattr(getattr(operation, "activation", None), "__name__", "linear")
        parts = 1 + int(activation != "linear" or call.outputs[0] in self._normalized)
        result = self._activation(call.outputs[0], call)
        if isinstance(rule, SeparableConvRule):
            reads = (self._depthwise(call, reads, result),)
        else:
            for _ in list(rule.macs(call, self._flow))[1:]:
                # As large as the result: what lies between is not known.
                between = Buffer(result.size, call)
                self._append(call, "", reads, between, constants=2, name_parts=parts)
                reads = (between,)
        self._append(call, reads=reads, writes=result, **self._weighted(call, result))
        if activation not in FUSED:
            if is_image and activation not in KEEP_ROWS:
                result, is_image = self._reshaped(call, result, name_parts=5), False
            result = self._activated(call, activation, result)
        self._write(call, result, is_image)

    def _read_weighted(self, call: Call, value: Value, is_image: bool) -> Buffer:
        if not is_image:
            return self._read(call, value)
        layer = call.operation
        if getattr(layer, "padding", "") != "causal":
            return self._image(call, value)
        read = self._read(call, value)
        margin = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        length = (value.shape[1] or self._flow.sizes(value)[1] or 1) + margin
        padded = Buffer((read.size[0], length, *read.size[2:]), call)
        self._append(call, "PAD", (read,), padded, constants=1, name_parts=2)
        return self._reshaped(call, padded, name_parts=3)

    def _depthwise(self, call: Call, reads: tuple[Buffer, ...], result: Buffer) -> Buffer:
        """The first of the two operations of a separable convolution, which has a bias of zeros."""
        channels = self._flow.roles(call.operation).get("mid")
        if channels is None:
            channels = call.operation.pointwise_kernel.shape[-2]
        between = Buffer((*result.size[:-1], channels), call)
        self._append(
            call,
            "DEPTHWISE_CONV_2D",
            reads,
            between,
            constants=2,
            name_parts=5,
            channels=channels,
            zeros=channels,
        )
        return between

    def _weighted(self, call: Call, result: Buffer) -> dict[str, Any]:
        """Kernel, tensors, channels and names of an operation with weights."""
        operation, rule = call.operation, rule_for(call.operation)
        value = call.outputs[0]
        channels: Extent | None = self._flow.roles(operation).get("out")
        if channels is None:
            channels = value.shape[-1] or 1
        has_bias = getattr(operation, "bias", None) is not None
        is_normalized = value in self._normalized
        is_fused = self._content.is_read_by_fused(value)
        on_rows = isinstance(operation, ON_ROWS)
        if isinstance(rule, DepthwiseConvRule):
            kernel, own = "DEPTHWISE_CONV_2D", 3 if has_bias else 1
            own += (6 if on_rows else 4) * is_normalized + on_rows
            parts = 2 * (own + is_fused) + (own - 2 if is_normalized else 1)
        elif isinstance(rule, ConvRule | ConvTransposeRule | SeparableConvRule):
            is_transposed = isinstance(rule, ConvTransposeRule)
            kernel, own = "TRANSPOSE_CONV" if is_transposed else "CONV_2D", 3 if has_bias else 1
            own += (4 if has_bias else 2) * is_normalized + on_rows
            own += 6 * (is_normalized and (is_transposed or on_rows))
            parts = 2 * (own + is_fused) + 1 + is_transposed
        else:
            kernel = "FULLY_CONNECTED"
            parts = (1 + is_fused) + 1 + (2 + 2 * is_normalized + is_fused)
            parts += 4 * (is_normalized and not has_bias)
        return {
            "kernel": kernel,
            "constants": 2 + (kernel == "TRANSPOSE_CONV"),
            "channels": channels,
            "name_parts": parts,
            "scratch": scratch_of(call, kernel, result),
        }
