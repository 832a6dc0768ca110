r"""Latency as a cost: measured times of layers, as functions of how many channels are left.

=================  ==========================================================================
symbol             meaning
=================  ==========================================================================
`n_in`, `n_out`    channels that a layer reads and creates
`c, f, g`          times of a layer: a constant, and curves of its channels (`LayerTimes`)
`e`                what one channel that becomes one channel takes besides
`p`                time for each of `m` features that are picked, of an input or a flattened map
`b`                time of calling a network with nothing in it
`a`                factor that makes the time of the dense model what was measured
=================  ==========================================================================

    t = b + a (m p + sum over calls (c + f(n_in) g(n_out) + e [n_in = n_out = 1]))

A kernel goes through all inputs for every tile of outputs: hence the product. Layers whose channels
are tied (depthwise convolutions, pooling, additions) have one curve, and those that cannot be
measured with fewer channels a constant only. A convolution from one channel to one is run as a
depthwise one, whose kernel wastes all but one channel of its tile: hence `e`.

Times mostly rise with the channels, but not always: 63 unaligned channels may take longer than 64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
from keras import layers

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph.calls import Call, Value
from tf_kfacprune.graph.curves import Curve
from tf_kfacprune.graph.labels import LabelFlow
from tf_kfacprune.graph.rules import ContractionRule, Extent, rule_for
from tf_kfacprune.graph.rules.activations import ActivationRule, ElementwiseRule
from tf_kfacprune.graph.rules.base import ChannelRule
from tf_kfacprune.graph.rules.channelwise import BatchNormalizationRule
from tf_kfacprune.graph.rules.contractions import ConvRule, DepthwiseConvRule
from tf_kfacprune.graph.rules.reshaping import IndexRule
from tf_kfacprune.graph.sizes import Curved, Factor

__all__ = [
    "LATENCY_OF",
    "LatencyTable",
    "LayerTimes",
    "has_tied_channels",
    "latency_channels",
    "latency_products",
    "layer_signature",
    "picking",
    "takes_time",
]

# Formats of `kp.export.tflite` that can be timed: the second is the full int8 file.
LATENCY_OF = ("float32", "int8")

# Microseconds for each of the features that are picked out of a vector (GATHER), measured on one
# x86 processor: a few hundred of them take as long as calling the network.
_PICKING = {"float32": 0.006, "int8": 0.004}

# What these layers do takes no time: the converter folds or fuses them.
_FREE = (BatchNormalizationRule, IndexRule, ElementwiseRule)
_FUSED = ("linear", "relu", "relu6")
_NOT_IN_SIGNATURE = (
    "initializer",
    "regularizer",
    "constraint",
    "lora",
    "quantization",
    "trainable",
)
_NO_CURVE = Curve((1.0,), (1.0,))
_NOTHING = Curve((1.0,), (0.0,))
_ONLY_ONE = Curve((1.0, 2.0), (1.0, 0.0))


@dataclass(frozen=True)
class LayerTimes:
    """Microseconds of a layer: `constant + inputs(n_in) * outputs(n_out)`.

    Args:
        constant: The part that no channel changes; negative if inputs and outputs have parts of
            their own: `a + b x + c y + d x y` is a product but for a constant.
        inputs: Curve of the channels that are read.
        outputs: Curve of the channels that are created, or of those of tied ones.
        one_to_one: What is to be added if one channel is read and one is created.

    Raises:
        InvalidArgumentError: If a curve is negative, or the layer can take less than no time.
    """

    constant: float = 0.0
    inputs: Curve = _NO_CURVE
    outputs: Curve = _NOTHING
    one_to_one: float = 0.0

    def __post_init__(self) -> None:
        inputs, outputs = min(self.inputs.values), min(self.outputs.values)
        if not min(inputs, outputs, self.constant + inputs * outputs, self.one_to_one) >= 0.0:
            raise InvalidArgumentError(
                f"Times of a LatencyTable must not be negative. Received: {self}. Measure again "
                "with kp.export.latency_table(model, refresh=True)."
            )

    def at(self, inputs: float, outputs: float) -> float:
        """Microseconds for so many channels."""
        single = self.one_to_one * _ONLY_ONE.at(inputs) * _ONLY_ONE.at(outputs)
        return self.constant + self.inputs.at(inputs) * self.outputs.at(outputs) + single

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LayerTimes:
        """From the dictionary that `dataclasses.asdict` makes."""
        curves = {
            name: Curve(*(tuple(config[name][part]) for part in ("sizes", "values")))
            for name in ("inputs", "outputs")
        }
        return cls(**{**config, **curves})


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class LatencyTable:
    """Times of the layers of a model on one processor, measured by `kp.export.latency_table`.

    A table knows which file it is of, and `Budget(latency=...)` bounds what its table is of.

    Args:
        processor: Where they were measured.
        layers: Times of each distinct layer, by its `layer_signature`.
        of: `"float32"`, or `"int8"` for the full int8 file.
        scale: What all of them are multiplied by: the time of the dense model beyond the overhead,
            as measured, over the sum of its layers'.
        overhead: Microseconds of calling a network with nothing in it.

    Raises:
        InvalidArgumentError: If `of` is none of these, or scale or overhead are negative.

    Examples:
        >>> table = kp.export.latency_table(network, of="int8")
        >>> pm = kp.PrunableModel(network, kp.Budget(latency=0.3), latency_table=table)
    """

    processor: str
    layers: Mapping[str, LayerTimes]
    of: str = "float32"
    scale: float = 1.0
    overhead: float = 0.0

    def __post_init__(self) -> None:
        if self.of not in LATENCY_OF:
            raise InvalidArgumentError(
                f"Argument `of` must be one of {LATENCY_OF}. Received: of={self.of!r}"
            )
        if not (self.scale >= 0.0 and self.overhead >= 0.0):
            raise InvalidArgumentError(
                "Times of a LatencyTable must not be negative. Received: "
                f"scale={self.scale}, overhead={self.overhead}."
            )

    def times(self, call: Call) -> LayerTimes:
        """Times of the layer that is called."""
        signature = layer_signature(call)
        if signature not in self.layers:
            raise InvalidArgumentError(
                f"The latency table (of {self.processor}) does not know layer {call.path!r}: "
                f"{signature}. It belongs to another model. Measure this one with "
                "kp.export.latency_table(model)."
            )
        return self.layers[signature]

    def get_config(self) -> dict[str, Any]:
        """The arguments, for serialization."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LatencyTable:
        """Inverse of `get_config`."""
        rows = {name: LayerTimes.from_config(row) for name, row in config["layers"].items()}
        return cls(**{**config, "layers": rows})


def layer_signature(call: Call) -> str:
    """What decides how long a layer takes: its class, settings and input shape, as text."""
    settings = {
        key: value
        for key, value in call.operation.get_config().items()
        if value is not None and key != "name" and not any(w in key for w in _NOT_IN_SIGNATURE)
    }
    settings["dtype"] = call.operation.compute_dtype
    shapes = "+".join("x".join(map(str, value.shape[1:])) for value in call.inputs)
    described = json.dumps(settings, sort_keys=True, default=str)
    return f"{type(call.operation).__name__} of {shapes}: {described}"


def takes_time(call: Call) -> bool:
    """Whether something is left of a layer in a file, and its rule says what it does."""
    layer, rule = call.operation, rule_for(call.operation)
    is_known = type(rule) is not ChannelRule and not isinstance(layer, layers.InputLayer)
    is_free = (
        rule.is_absent
        or isinstance(rule, _FREE)
        or (
            isinstance(rule, ActivationRule) and getattr(layer.activation, "__name__", "") in _FUSED
        )
    )
    return is_known and bool(call.inputs) and not is_free


def has_tied_channels(call: Call) -> bool:
    """Whether a layer creates channels from as many that it reads, each from its own."""
    rule, layer = rule_for(call.operation), call.operation
    if isinstance(rule, ConvRule):
        return layer.groups > 1 and layer.kernel.shape[-2] == 1
    return isinstance(rule, DepthwiseConvRule) or not isinstance(rule, ContractionRule)


def latency_channels(call: Call, flow: LabelFlow) -> tuple[Extent, Extent]:
    """What the curves of a layer are functions of.

    Returns:
        Channels that are read and created; 1 and the common ones where they are tied.
    """
    rule, roles = rule_for(call.operation), flow.roles(call.operation)
    if not isinstance(rule, ContractionRule):
        (tracked,) = [labels for labels in flow.axes[call.outputs[0]] if labels is not None]
        return 1, flow.base(tracked)
    axis = rule.channel_axis(call)

    def extent(role: str, value: Value) -> Extent:
        labels = roles.get(role)
        return (value.shape[axis] or 1) if labels is None else labels

    read, created = extent("in", call.inputs[0]), extent("out", call.outputs[0])
    return (1, read) if has_tied_channels(call) else (read, created)


def picking(table: LatencyTable) -> float:
    """Microseconds for each feature that is picked, of an input or of a flattened map."""
    return table.scale * _PICKING[table.of]


def latency_products(call: Call, flow: LabelFlow, table: LatencyTable) -> Iterator[list[Factor]]:
    """Microseconds of a call: a sum of products, whose first factor is a coefficient."""
    if not takes_time(call):
        return
    times = table.times(call)
    yield [table.scale * times.constant]
    if times.outputs == _NOTHING:
        return
    read, created = latency_channels(call, flow)
    yield [table.scale, Curved(read, times.inputs), Curved(created, times.outputs)]
    if times.one_to_one:
        ones = (Curved(read, _ONLY_ONE), Curved(created, _ONLY_ONE))
        yield [table.scale * times.one_to_one, *ones]
