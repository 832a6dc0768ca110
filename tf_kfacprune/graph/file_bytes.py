"""Bytes of the float32 `.tflite` file: four per weight that it stores, and a share for each layer.

The converter folds a BatchNormalization that follows a weighted layer into that layer's kernel and
bias, fuses ReLUs, and gives every convolution a bias. What is left of each layer are its operators,
with a record, a buffer and a name for each of their tensors. The sizes of these records were
measured on files of the converter of TensorFlow 2.21; names are taken to be as long as usual. That
predicts whole files to one or two per cent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from keras import layers

from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.rules import ContractionRule, Extent, rule_for
from tf_kfacprune.graph.rules.activations import HomogeneousRule, ReLURule
from tf_kfacprune.graph.rules.base import extents
from tf_kfacprune.graph.rules.channelwise import SpatialRule
from tf_kfacprune.graph.rules.contractions import ConvRule, ConvTransposeRule, DepthwiseConvRule
from tf_kfacprune.graph.rules.reshaping import IndexRule

__all__ = ["FileBytes", "is_plain_relu"]

_PER_VALUE = 4
_FILE = 390  # header, metadata, signature, input and output
_TENSOR, _OPERATOR = 105, 45
_CONSTANT = 44  # what the constant of a removed branch needs beside its values
# Names are made of parts such as "model/layer/operation": of so many characters beside the layer's.
_NAME_PART = 22
_CEILING = 6  # of the ReLU that operators know

_BIASED = (ConvRule, ConvTransposeRule, DepthwiseConvRule)


class FileBytes:
    """What calls and layers contribute to the file, as products of extents.

    Args:
        channels: The channel graph.
    """

    def __init__(self, channels: ChannelGraph) -> None:
        self._channels = channels
        calls = channels.graph.calls
        self._readers: dict[Any, list[Call]] = {}
        for call in calls:
            for value in call.inputs:
                self._readers.setdefault(value, []).append(call)
        self._read_once = {value for value, calls in self._readers.items() if len(calls) == 1}

    def of_file(self) -> Iterator[list[Extent]]:
        """What does not belong to a layer: the frame, and the choice of features."""
        yield [_FILE]
        for producer in self._channels.picked:
            yield [_records(operators=1, tensors=2, names=3, path=producer.name)]
            yield [_PER_VALUE, producer.labels]

    def of_weights(self, call: Call, weights: Sequence[list[Extent]]) -> Iterator[list[Extent]]:
        """Stored values of a layer, given one product of extents for each of its weights."""
        if isinstance(call.operation, layers.BatchNormalization):
            if not self.is_folded(call) and weights:
                yield [2 * _PER_VALUE, *weights[0]]
            return
        for weight in weights:
            yield [_PER_VALUE, *weight]
        if isinstance(rule_for(call.operation), _BIASED) and call.operation.bias is None:
            out = self._channels.flow.roles(call.operation).get("out")
            yield [_PER_VALUE, call.outputs[0].shape[-1] or 1 if out is None else out]

    def of_call(self, call: Call) -> int:
        """Bytes of the operators, tensors and names of a call."""
        operation, rule = call.operation, rule_for(call.operation)
        if isinstance(operation, layers.BatchNormalization):
            if self.is_folded(call):
                return 0
            return _records(operators=2, tensors=4, names=6, path=call.path)
        if rule.is_absent or self.is_fused(call):
            return 0
        if isinstance(rule, ContractionRule | DepthwiseConvRule):
            kernels = max(len(list(rule.macs(call, self._channels.flow))), 1)
            names = 6
            if isinstance(rule, _BIASED) and operation.bias is not None:
                names = 7 if _is_linear(operation) else 10
            return kernels * _records(operators=1, tensors=3, names=names, path=call.path)
        if isinstance(rule, IndexRule):  # the batch size is free: the new shape is computed
            return _records(operators=4, tensors=7, names=7, path=call.path)
        tensors = 1 if isinstance(rule, SpatialRule) and _has_window(operation) else 2
        return _records(operators=1, tensors=tensors, names=tensors, path=call.path)

    def of_constant(self, call: Call) -> Iterator[list[Extent]]:
        """What `Add` stores in place of an operand that is the same at every position.

        Nothing if the converter adds it to a bias instead: then the file is a little smaller.
        """
        flow, value = self._channels.flow, call.outputs[0]
        labelled = [axis for axis, labels in enumerate(flow.of(value)) if labels is not None]
        yield [_CONSTANT]
        yield [_PER_VALUE, *extents(value, flow, labelled or [-1])]

    def is_folded(self, call: Call) -> bool:
        """Whether a BatchNormalization disappears into the layer before it."""
        (value, *_) = call.inputs
        maker = self._channels.graph.makers.get(value)
        if maker is None or value not in self._read_once:
            return False
        rule = rule_for(maker.operation)
        is_weighted = isinstance(rule, ContractionRule | DepthwiseConvRule)
        return is_weighted and _is_linear(maker.operation)

    def is_read_by_fused(self, value: Any) -> bool:
        """Whether a ReLU, perhaps behind a normalization that is folded, joins what makes a value.

        A layer's own activation counts, too.
        """
        maker = self._channels.graph.makers.get(value)
        if maker is not None and not _is_linear(maker.operation):
            return True
        for call in self._readers.get(value, ()):
            if isinstance(call.operation, layers.BatchNormalization):
                return self.is_folded(call) and self.is_read_by_fused(call.outputs[0])
            return self.is_fused(call)
        return False

    def is_read_once(self, value: Any) -> bool:
        """Whether one call reads a value."""
        return value in self._read_once

    def is_read_by_dense(self, call: Call) -> bool:
        """Whether Dense layers alone read what a call returns."""
        readers = self._readers.get(call.outputs[0], [])
        return bool(readers) and all(isinstance(r.operation, layers.Dense) for r in readers)

    def is_fused(self, call: Call) -> bool:
        """Whether an activation disappears into the operator before it."""
        return (
            _is_fusable(call.operation) and bool(call.inputs) and call.inputs[0] in self._read_once
        )


def is_plain_relu(layer: layers.ReLU) -> bool:
    """Whether operators know a `ReLU`: one without slope and threshold, up to 6 or without end."""
    is_plain = not layer.negative_slope and not layer.threshold
    return is_plain and layer.max_value in (None, _CEILING)


def _is_fusable(operation: Any) -> bool:
    """Whether an operation is a ReLU that operators know, or hands on what it reads."""
    rule = rule_for(operation)
    if isinstance(rule, ReLURule):
        return is_plain_relu(operation)
    if isinstance(rule, HomogeneousRule):
        return type(operation).__name__ not in ("LeakyReLU", "LeakyRelu")
    name = getattr(getattr(operation, "activation", None), "__name__", "")
    return isinstance(operation, layers.Activation) and name in ("relu", "relu6")


def _is_linear(layer: Any) -> bool:
    return getattr(getattr(layer, "activation", None), "__name__", "linear") == "linear"


def _has_window(layer: Any) -> bool:
    """Whether a layer slides a window; global pooling stores the axes that it reduces."""
    return hasattr(layer, "pool_size")


def _records(operators: int, tensors: int, names: int, path: str) -> int:
    return operators * _OPERATOR + tensors * _TENSOR + names * (_NAME_PART + len(path))
