"""Gates for channels that a layer reads inside, where no gate can stand on an edge.

Normalizations take statistics over channels, recurrent layers feed their units back, attention
has heads: there, closing a channel is a matter of how the layer is called. Its channel rule knows
(`ChannelRule.call_gated`); the wrapper here carries the layer and the gates to the rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph import ChannelRule, rule_for
from tf_kfacprune.graph.calls import GATES
from tf_kfacprune.graph.rules import InnerGates

__all__ = ["GateAware"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GateAware(keras.layers.Layer):
    """A layer that is called as if its closed channels were not there.

    It owns the ordinary layer, with its weights, and takes the arguments of that layer; one more,
    `gates`, receives the two outputs of a `GateBank`. With all gates open it computes what the
    layer computes, to the bit. Compaction puts the ordinary layer back, made smaller.

    Attributes:
        gate_aware_of: The layer; read by the tracer, which lets the analysis see through.
        indices: For each role that the layer reads inside, the number of each channel's gate, or
            the number of gates in the bank for a channel that is never pruned.

    Args:
        layer: The layer. Its channel rule defines `call_gated`.
        indices: As the attribute.
        **kwargs: Arguments of `keras.layers.Layer`; by default the name is that of the layer.

    Raises:
        UnsupportedModelError: If the layer's channel rule does not define `call_gated`.
    """

    def __init__(
        self, layer: keras.layers.Layer, indices: Mapping[str, Sequence[int]], **kwargs: Any
    ) -> None:
        rule = rule_for(layer)
        if type(rule).call_gated is ChannelRule.call_gated:
            raise UnsupportedModelError(
                f"Layer {layer.name!r} ({type(layer).__name__}) reads channels inside "
                f"({', '.join(indices)}), but its channel rule {type(rule).__name__} does not say "
                "how to call it when some of them are closed. Define `call_gated` in the rule."
            )
        # Keras reads the signature of `call` once, in the base constructor.
        self.__dict__["call"] = self._call_like(layer)
        kwargs = {"name": layer.name, **kwargs, "dtype": layer.dtype_policy, "autocast": False}
        super().__init__(**kwargs)
        self.gate_aware_of = layer
        self.indices = {role: np.asarray(index, "int32") for role, index in indices.items()}
        self.supports_masking = layer.supports_masking
        self.built = layer.built

    def _call_like(self, layer: keras.layers.Layer) -> Any:
        """A `call` with the signature of the layer's own and the argument `gates`."""
        signature = inspect.signature(layer.call)
        parameters = list(signature.parameters.values())

        def call(*args: Any, gates: Any, **kwargs: Any) -> Any:
            if not args:  # rules find the data that is read in the first position
                args = (kwargs.pop(parameters[0].name),)
            by_role = {role: self._pick(gates, index) for role, index in self.indices.items()}
            return rule_for(layer).call_gated(layer, by_role, args, kwargs)

        ends_open = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        extended = list(parameters)
        extended.insert(
            len(parameters) - ends_open, inspect.Parameter(GATES, inspect.Parameter.KEYWORD_ONLY)
        )
        call.__signature__ = signature.replace(parameters=extended)  # type: ignore[attr-defined]
        return call

    def _pick(self, gates: Sequence[Any], indices: np.ndarray) -> InnerGates:
        always = ops.ones((1,), dtype=gates[0].dtype)
        z, present = (ops.take(ops.concatenate([g, always]), indices) for g in gates)
        return InnerGates(z, present)

    def compute_output_spec(self, *args: Any, gates: Any = None, **kwargs: Any) -> Any:
        """That of the layer."""
        del gates
        return self.gate_aware_of.compute_output_spec(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """That of the layer."""
        return self.gate_aware_of.compute_mask(inputs, previous_mask)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("dtype", None)
        layer = keras.saving.serialize_keras_object(self.gate_aware_of)
        indices = {role: index.tolist() for role, index in self.indices.items()}
        return {**config, "layer": layer, "indices": indices}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GateAware:
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})
