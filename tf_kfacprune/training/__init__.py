"""Training: models whose `fit` prunes, preconditions and flattens."""

from tf_kfacprune.training.kfac_model import KFACModel
from tf_kfacprune.training.prunable_model import PrunableModel

__all__ = ["KFACModel", "PrunableModel"]
