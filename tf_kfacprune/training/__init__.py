"""Training: models whose `fit` prunes, preconditions and flattens."""

from tf_kfacprune.training.kfac_model import TRACING, KFACModel
from tf_kfacprune.training.prunable_model import PrunableModel

__all__ = ["TRACING", "KFACModel", "PrunableModel"]
