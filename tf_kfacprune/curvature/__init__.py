"""Curvature: Kronecker blocks and factors, capture, spectral radius, exact diagnostics."""

from tf_kfacprune.curvature.blocks import (
    KroneckerBlock,
    LayerBlocks,
    LocationSample,
    Record,
    block_for,
    blocks_of,
)
from tf_kfacprune.curvature.capture import (
    capture,
    of_examples,
    per_example_gradients,
    probe_gradients,
)
from tf_kfacprune.curvature.discovery import NetworkBlocks, find_blocks
from tf_kfacprune.curvature.fisher import (
    SampledLikelihood,
    exact_likelihoods,
    sampled_likelihood,
)
from tf_kfacprune.curvature.gate_curvature import find_gate_layers, gate_curvature
from tf_kfacprune.curvature.gauss_newton import gauss_newton_form
from tf_kfacprune.curvature.objective import Objective
from tf_kfacprune.curvature.second_derivatives import check_second_derivatives
from tf_kfacprune.curvature.spectral_radius import (
    SpectralRadius,
    along_gradients,
    layer_spectral_radius,
)

__all__ = [
    "KroneckerBlock",
    "LayerBlocks",
    "LocationSample",
    "NetworkBlocks",
    "Objective",
    "Record",
    "SampledLikelihood",
    "SpectralRadius",
    "along_gradients",
    "block_for",
    "blocks_of",
    "capture",
    "check_second_derivatives",
    "exact_likelihoods",
    "find_blocks",
    "find_gate_layers",
    "gate_curvature",
    "gauss_newton_form",
    "layer_spectral_radius",
    "of_examples",
    "per_example_gradients",
    "probe_gradients",
    "sampled_likelihood",
]
