"""Optimizers: K-FAC."""

from tf_kfacprune.optimizers.hyperparameters import LevenbergMarquardt
from tf_kfacprune.optimizers.kfac import KFAC

__all__ = ["KFAC", "LevenbergMarquardt"]
