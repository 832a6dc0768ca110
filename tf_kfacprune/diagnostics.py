"""Curvature of a trained model: exact eigenvalues, density, trace; and the K-FAC estimate."""

from tf_kfacprune.curvature.diagnostics import (
    HessianSpectrum,
    TraceEstimate,
    hessian_density,
    hessian_spectrum,
    hessian_trace,
)
from tf_kfacprune.curvature.kronecker_radius import KroneckerRadius, spectral_radius

__all__ = [
    "HessianSpectrum",
    "KroneckerRadius",
    "TraceEstimate",
    "hessian_density",
    "hessian_spectrum",
    "hessian_trace",
    "spectral_radius",
]
