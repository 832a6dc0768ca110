r"""Latency as a cost: measured times of layers, as smooth functions of how many channels are left.

=======================  ====================================================================
symbol                   meaning
=======================  ====================================================================
`m`                      multiply-accumulates of one call of a layer with weights
`n_in`, `n_out`          channels that it reads and creates
`v`                      values that a layer without weights reads (pooling, addition...)
`a, b, c, d, e, f >= 0`  microseconds: constant, per MAC, per input and output channel of a layer;
                         per value of all layers without weights; of calling the network at all
=======================  ====================================================================

    t = f + sum over calls with weights (a + b m + c n_in + d n_out) + sum over others (e v)

Coefficients that are not negative make the time rise with every neuron, as budgets need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
from keras import layers

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph.calls import Call
from tf_kfacprune.graph.labels import LabelFlow
from tf_kfacprune.graph.rules import Extent, rule_for
from tf_kfacprune.graph.rules.activations import ElementwiseRule
from tf_kfacprune.graph.rules.base import extents
from tf_kfacprune.graph.rules.channelwise import BatchNormalizationRule, NoiseRule
from tf_kfacprune.graph.rules.reshaping import IndexRule

__all__ = ["LatencyTable", "latency_products", "layer_signature", "values_read"]

# What these layers do takes no time: the converter folds or fuses them, or nothing is left.
_FREE = (BatchNormalizationRule, NoiseRule, IndexRule, ElementwiseRule)
_NOT_IN_SIGNATURE = (
    "initializer",
    "regularizer",
    "constraint",
    "lora",
    "quantization",
    "trainable",
)


@keras.saving.register_keras_serializable(package="tf_kfacprune")
@dataclass(frozen=True)
class LatencyTable:
    """Times of the layers of a model on one processor, measured by `kp.export.latency_table`.

    Args:
        processor: Where they were measured.
        layers: For each distinct layer, by its `layer_signature`, microseconds: constant, per MAC,
            per input channel, per output channel.
        per_value: Microseconds per value that layers without weights read.
        overhead: Microseconds of calling a network with nothing in it.

    Raises:
        InvalidArgumentError: If a time is negative: a budget needs times that rise with size.

    Examples:
        >>> table = kp.export.latency_table(network)
        >>> pm = kp.PrunableModel(network, kp.Budget(latency=0.3), latency_table=table)
    """

    processor: str
    layers: Mapping[str, tuple[float, ...]]
    per_value: float = 0.0
    overhead: float = 0.0

    def __post_init__(self) -> None:
        times = [self.per_value, self.overhead, *(t for row in self.layers.values() for t in row)]
        if any(not time >= 0.0 for time in times):
            raise InvalidArgumentError(
                "Times of a LatencyTable must not be negative. Received: "
                f"{[time for time in times if not time >= 0.0][:3]}. Measure again with "
                "kp.export.latency_table(model, refresh=True)."
            )

    def times(self, call: Call) -> tuple[float, ...]:
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
        config = asdict(self)
        return {**config, "layers": {name: list(row) for name, row in self.layers.items()}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LatencyTable:
        """Inverse of `get_config`."""
        rows = {name: tuple(row) for name, row in config["layers"].items()}
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


def latency_products(
    call: Call, flow: LabelFlow, table: LatencyTable
) -> Iterator[list[Extent | float]]:
    """Microseconds of a call: a sum of products, whose first factor is a coefficient."""
    macs = list(rule_for(call.operation).macs(call, flow))
    if not macs:
        yield [table.per_value, *values_read(call, flow)]
        return
    fixed, per_mac, per_input, per_output = table.times(call)
    yield [fixed]
    for product in macs:
        yield [per_mac, *product]
    roles = flow.roles(call.operation)
    for time, role, value in (
        (per_input, "in", call.inputs[0]),
        (per_output, "out", call.outputs[0]),
    ):
        channels = roles.get(role)
        yield [time, (value.shape[-1] or 1) if channels is None else channels]


def values_read(call: Call, flow: LabelFlow) -> list[Extent]:
    """Number of values that a layer without weights reads, a product of extents; 0 if free."""
    is_free = isinstance(rule_for(call.operation), _FREE) or not call.inputs
    if is_free or isinstance(call.operation, layers.InputLayer):
        return [0]
    value = call.inputs[0]
    return extents(value, flow, range(1, len(value.shape)))
