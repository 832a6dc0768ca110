"""Pure linear algebra: factored damping, damped inverses, patches, Lanczos."""

from tf_kfacprune.linalg.inverse import damped_inverse
from tf_kfacprune.linalg.kronecker import factored_damping
from tf_kfacprune.linalg.lanczos import RitzPairs, SpectralDensity, lanczos_top, spectral_density
from tf_kfacprune.linalg.patches import conv_patches

__all__ = [
    "RitzPairs",
    "SpectralDensity",
    "conv_patches",
    "damped_inverse",
    "factored_damping",
    "lanczos_top",
    "spectral_density",
]
