"""Layers for people who build gated models by hand."""

from tf_kfacprune.gates import (
    Gated,
    GatedConv1D,
    GatedConv1DTranspose,
    GatedConv2D,
    GatedConv2DTranspose,
    GatedConv3D,
    GatedConv3DTranspose,
    GatedDense,
    GatedSeparableConv1D,
    GatedSeparableConv2D,
    NeuronGate,
)

__all__ = [
    "Gated",
    "GatedConv1D",
    "GatedConv1DTranspose",
    "GatedConv2D",
    "GatedConv2DTranspose",
    "GatedConv3D",
    "GatedConv3DTranspose",
    "GatedDense",
    "GatedSeparableConv1D",
    "GatedSeparableConv2D",
    "NeuronGate",
]
