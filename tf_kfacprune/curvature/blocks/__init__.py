"""Kronecker blocks: how each layer type turns into factors A and G, one idea per file."""

from tf_kfacprune.curvature.blocks.base import (
    KroneckerBlock,
    Record,
    for_rows,
    location_weights,
    spread_mask,
    total_weight,
)
from tf_kfacprune.curvature.blocks.convolutions import (
    ConvBlock,
    ConvTransposeBlock,
    DepthwiseConvBlock,
    PointwiseBlock,
)
from tf_kfacprune.curvature.blocks.dense import DenseBlock, EinsumDenseBlock, EmbeddingBlock
from tf_kfacprune.curvature.blocks.locations import LocationSample
from tf_kfacprune.curvature.blocks.normalization import ScaleShiftBlock
from tf_kfacprune.curvature.blocks.registry import LayerBlocks, blocks_of

__all__ = [
    "ConvBlock",
    "ConvTransposeBlock",
    "DenseBlock",
    "DepthwiseConvBlock",
    "EinsumDenseBlock",
    "EmbeddingBlock",
    "KroneckerBlock",
    "LayerBlocks",
    "LocationSample",
    "PointwiseBlock",
    "Record",
    "ScaleShiftBlock",
    "blocks_of",
    "for_rows",
    "location_weights",
    "spread_mask",
    "total_weight",
]
