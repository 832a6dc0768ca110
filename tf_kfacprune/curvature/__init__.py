"""Curvature: Kronecker blocks and factors, capture, spectral radius, exact diagnostics."""

from tf_kfacprune.curvature.batch import Batch
from tf_kfacprune.curvature.blocks import KroneckerBlock, LocationSample, Record, blocks_of
from tf_kfacprune.curvature.capture import capture
from tf_kfacprune.curvature.discovery import NetworkBlocks, find_blocks
from tf_kfacprune.curvature.estimator import (
    LABELS,
    LEAST_EXAMPLES,
    CurvatureEstimator,
    Look,
    Uses,
)
from tf_kfacprune.curvature.forward_state import ForwardState
from tf_kfacprune.curvature.gate_curvature import find_gate_layers, gate_curvature
from tf_kfacprune.curvature.likelihoods import Likelihood, expects_probabilities, likelihood_of
from tf_kfacprune.curvature.objective import CompiledObjective, SingleObjective
from tf_kfacprune.curvature.second_derivatives import check_second_derivatives
from tf_kfacprune.curvature.spectral_radius import (
    SpectralRadius,
    energy_of_gradients,
    energy_of_inputs,
)
from tf_kfacprune.curvature.twice_differentiable import (
    check_trained_twice_differentiably,
    mends,
    twice_differentiable,
)

__all__ = [
    "LABELS",
    "LEAST_EXAMPLES",
    "Batch",
    "CompiledObjective",
    "CurvatureEstimator",
    "ForwardState",
    "KroneckerBlock",
    "Likelihood",
    "LocationSample",
    "Look",
    "NetworkBlocks",
    "Record",
    "SingleObjective",
    "SpectralRadius",
    "Uses",
    "blocks_of",
    "capture",
    "check_second_derivatives",
    "check_trained_twice_differentiably",
    "energy_of_gradients",
    "energy_of_inputs",
    "expects_probabilities",
    "find_blocks",
    "find_gate_layers",
    "gate_curvature",
    "likelihood_of",
    "mends",
    "twice_differentiable",
]
