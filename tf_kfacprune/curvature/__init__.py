"""Curvature: Kronecker blocks and factors, capture, spectral radius, exact diagnostics."""

from tf_kfacprune.curvature.blocks import ConvBlock, DenseBlock, KroneckerBlock, block_for
from tf_kfacprune.curvature.capture import (
    Record,
    capture,
    kronecker_factors,
    per_example_gradients,
)
from tf_kfacprune.curvature.fisher import SampledLikelihood, sampled_likelihood
from tf_kfacprune.curvature.second_derivatives import check_second_derivatives
from tf_kfacprune.curvature.spectral_radius import SpectralRadius, layer_spectral_radius

__all__ = [
    "ConvBlock",
    "DenseBlock",
    "KroneckerBlock",
    "Record",
    "SampledLikelihood",
    "SpectralRadius",
    "block_for",
    "capture",
    "check_second_derivatives",
    "kronecker_factors",
    "layer_spectral_radius",
    "per_example_gradients",
    "sampled_likelihood",
]
