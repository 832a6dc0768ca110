"""Optimizers: K-FAC."""

from tf_kfacprune.optimizers.damping import LevenbergMarquardt
from tf_kfacprune.optimizers.kfac import KFAC

__all__ = ["KFAC", "LevenbergMarquardt"]
