"""Pure linear algebra: Kronecker products, damped inverses, patches, Lanczos, power iteration."""

from tf_kfacprune.linalg.inverse import damped_inverse
from tf_kfacprune.linalg.kronecker import factored_damping, kronecker_matvec
from tf_kfacprune.linalg.patches import conv_patches

__all__ = ["conv_patches", "damped_inverse", "factored_damping", "kronecker_matvec"]
