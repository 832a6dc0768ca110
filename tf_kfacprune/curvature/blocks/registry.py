"""Which layer has which blocks, and why the others have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import keras

from tf_kfacprune.curvature.blocks.base import KroneckerBlock
from tf_kfacprune.curvature.blocks.convolutions import (
    ConvBlock,
    ConvTransposeBlock,
    DepthwiseConvBlock,
    PointwiseBlock,
)
from tf_kfacprune.curvature.blocks.dense import DenseBlock, EinsumDenseBlock, EmbeddingBlock
from tf_kfacprune.curvature.blocks.normalization import ScaleShiftBlock

__all__ = ["ATTENTION", "LayerBlocks", "blocks_of", "no_rule"]

FROZEN = "the layer is not trainable"
PARTLY_FROZEN = "another weight of its block is not trainable"
LORA = "the layer carries LoRA weights"
QUANTIZED = "the layer is quantized"
NO_RULE = "this layer type has no Kronecker block"
NOT_LAST_AXIS = "its axis is not the last one (-1)"
RMS_SCALING = "LayerNormalization with rms_scaling has no Kronecker block"

_Maker = Callable[[keras.layers.Layer], list[KroneckerBlock]]


@dataclass(frozen=True)
class LayerBlocks:
    """The blocks of one layer, and why its other weights are in none.

    Attributes:
        blocks: The Kronecker blocks.
        reasons: Path of each weight without a block -> why.
    """

    blocks: list[KroneckerBlock] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def no_rule(layer: keras.layers.Layer) -> str:
    """Why a layer of a type without a block has none."""
    return f"{NO_RULE} ({type(layer).__name__})"


def _normalization_fault(layer: keras.layers.Layer) -> str | None:
    """Why a normalization has no block, or None."""
    if getattr(layer, "rms_scaling", False):
        return RMS_SCALING
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    last = {-1}
    if isinstance(layer, keras.layers.BatchNormalization):
        last.add(layer.input_spec.ndim - 1)
    return None if len(axes) == 1 and axes[0] in last else NOT_LAST_AXIS


def _fault(layer: keras.layers.Layer, with_frozen: bool) -> str | None:
    """Why a layer of a supported type has no block all the same, or None."""
    if not layer.trainable and not with_frozen:
        return FROZEN
    if getattr(layer, "lora_enabled", False):
        return LORA
    if getattr(layer, "quantization_mode", None):
        return QUANTIZED
    if isinstance(layer, keras.layers.EinsumDense):
        letters = EinsumDenseBlock.letters(layer)
        return letters if isinstance(letters, str) else None
    if type(layer) in _NORMALIZATIONS:
        return _normalization_fault(layer)
    return None


_layers = keras.layers
_NORMALIZATIONS = (
    _layers.BatchNormalization,
    _layers.LayerNormalization,
    _layers.RMSNormalization,
)
_MAKERS: dict[type, _Maker] = {
    _layers.Dense: lambda layer: [DenseBlock(layer)],
    _layers.EinsumDense: lambda layer: [EinsumDenseBlock(layer)],
    _layers.Embedding: lambda layer: [EmbeddingBlock(layer)],
    **dict.fromkeys(
        (_layers.Conv1D, _layers.Conv2D, _layers.Conv3D), lambda layer: [ConvBlock(layer)]
    ),
    **dict.fromkeys(
        (_layers.DepthwiseConv1D, _layers.DepthwiseConv2D),
        lambda layer: [DepthwiseConvBlock(layer)],
    ),
    **dict.fromkeys(
        (_layers.SeparableConv1D, _layers.SeparableConv2D),
        lambda layer: [DepthwiseConvBlock(layer), PointwiseBlock(layer)],
    ),
    **dict.fromkeys(
        (_layers.Conv1DTranspose, _layers.Conv2DTranspose, _layers.Conv3DTranspose),
        lambda layer: [ConvTransposeBlock(layer)],
    ),
    **dict.fromkeys(_NORMALIZATIONS, lambda layer: [ScaleShiftBlock(layer)]),
}
ATTENTION = (_layers.MultiHeadAttention, _layers.GroupQueryAttention)
_PROJECTIONS = ("query", "key", "value", "output", "gate")


def blocks_of(layer: keras.layers.Layer, *, with_frozen: bool = False) -> LayerBlocks:
    """The Kronecker blocks of a layer, and the reason for every weight in none of them.

    Subclasses of supported layers are not supported: their `call` may differ.

    Args:
        layer: A built Keras layer, not a model.
        with_frozen: Whether layers that are not trainable have blocks, too.

    Returns:
        A `LayerBlocks`.
    """
    if type(layer) in ATTENTION:
        return _attention_blocks(layer, with_frozen)
    maker = _MAKERS.get(type(layer))
    fault = _fault(layer, with_frozen) if maker else no_rule(layer)
    weights = layer.weights if with_frozen else layer.trainable_weights
    blocks = maker(layer) if maker and fault is None and weights else []
    if blocks and not with_frozen:
        whole = [block for block in blocks if all(v.trainable for v in block.variables)]
        fault = None if len(whole) == len(blocks) else PARTLY_FROZEN
        blocks = whole
    covered = {id(v) for block in blocks for v in block.variables}
    rest = [v for v in layer.weights if id(v) not in covered and (fault or v.trainable)]
    return LayerBlocks(blocks, {v.path: fault or NO_RULE for v in rest})


def _attention_blocks(layer: keras.layers.Layer, with_frozen: bool) -> LayerBlocks:
    """One block per projection of an attention layer."""
    found = LayerBlocks()
    for part in _PROJECTIONS:
        projection = getattr(layer, f"_{part}_dense", None)
        if projection is None:
            continue
        of_projection = blocks_of(projection, with_frozen=with_frozen)
        for block in of_projection.blocks:
            block.name = f"{layer.name}/{part}"
            block.attention = layer
            found.blocks.append(block)
        found.reasons.update(of_projection.reasons)
    return found
