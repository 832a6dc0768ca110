"""Pure linear algebra: Kronecker products, damped inverses, patches, Lanczos, power iteration."""

from tf_kfacprune.linalg.inverse import damped_inverse
from tf_kfacprune.linalg.kronecker import factored_damping, kronecker_matvec
from tf_kfacprune.linalg.lanczos import RitzPairs, SpectralDensity, lanczos_top, spectral_density
from tf_kfacprune.linalg.patches import conv_patches
from tf_kfacprune.linalg.power_iteration import power_iteration

__all__ = [
    "RitzPairs",
    "SpectralDensity",
    "conv_patches",
    "damped_inverse",
    "factored_damping",
    "kronecker_matvec",
    "lanczos_top",
    "power_iteration",
    "spectral_density",
]
