"""Which layers quantization-aware training quantizes, and why others stay float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tf_kfacprune.tfmot.legacy import Legacy

__all__ = ["LayerDecision", "QuantizationReport", "decide"]

_CONTRACTIONS = ("Conv2D", "DepthwiseConv2D", "Dense")
_SEPARABLE = ("SeparableConv1D", "SeparableConv2D")

NO_FORM = "tensorflow-model-optimization has no quantized form of this layer"
NO_ACTIVATION = "its activation has no quantized form"
NORMALIZATION = "only a BatchNormalization right behind a convolution or Dense is folded into it"
SHARED = "it is called more than once"
GROUPED = "grouped convolutions have no quantized form"


@dataclass(frozen=True)
class LayerDecision:
    """What becomes of one layer.

    Attributes:
        name: its name in the translated model.
        kind: its class.
        quantized: whether it is trained and exported in int8.
        reason: why not; empty if it is.
    """

    name: str
    kind: str
    quantized: bool
    reason: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """What becomes of every layer; printing it shows those that stay float.

    Attributes:
        layers: one decision for each layer, in the order of the model.
    """

    layers: Sequence[LayerDecision]

    @property
    def floating(self) -> tuple[LayerDecision, ...]:
        """The layers that stay float."""
        return tuple(layer for layer in self.layers if not layer.quantized)

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers) - len(self.floating)} of {len(self.layers)} layers are quantized."
        ]
        lines += [f"{one.name} ({one.kind}) stays float: {one.reason}" for one in self.floating]
        return "\n".join(lines)


def decide(model: Any, legacy: Legacy) -> QuantizationReport:
    """Decides layer by layer for a translated model.

    Args:
        model: a functional tf_keras model.
        legacy: the packages.

    Returns:
        One decision for every layer but the inputs.
    """
    registry = legacy.tfmot.quantization.keras.default_8bit.Default8BitQuantizeScheme()
    supports = registry.get_quantize_registry().supports
    decisions = []
    for layer in model.layers:
        kind = type(layer).__name__
        if kind == "InputLayer":
            continue
        reason = _reason(layer, kind, supports)
        decisions.append(LayerDecision(layer.name, kind, not reason, reason))
    return QuantizationReport(tuple(decisions))


def _reason(layer: Any, kind: str, supports: Any) -> str:
    """Why a layer stays float; empty if it does not."""
    if len(layer.inbound_nodes) > 1:
        return SHARED
    if kind == "BatchNormalization":
        return "" if _follows_contraction(layer) else NORMALIZATION
    if kind == "Conv2D" and layer.groups > 1:
        return GROUPED
    if kind in _SEPARABLE:
        return "" if layer.activation.__name__ in ("linear", "relu") else NO_ACTIVATION
    return "" if supports(layer) else NO_FORM


def _follows_contraction(layer: Any) -> bool:
    """Whether the normalization is the only reader of a linear convolution or Dense."""
    producer = layer.inbound_nodes[0].inbound_layers
    if isinstance(producer, list):
        return False
    return (
        type(producer).__name__ in _CONTRACTIONS
        and producer.activation.__name__ == "linear"
        and len(producer.outbound_nodes) == 1
        and len(producer.inbound_nodes) == 1
        and getattr(producer, "groups", 1) == 1
    )
