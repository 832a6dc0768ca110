"""Exact curvature of a trained model: top eigenvalues, spectral density, trace."""

from tf_kfacprune.curvature.diagnostics import (
    HessianSpectrum,
    TraceEstimate,
    hessian_density,
    hessian_spectrum,
    hessian_trace,
)

__all__ = [
    "HessianSpectrum",
    "TraceEstimate",
    "hessian_density",
    "hessian_spectrum",
    "hessian_trace",
]
