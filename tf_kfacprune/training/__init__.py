"""Training: the model that prunes itself while it learns."""

from tf_kfacprune.training.budget_controller import BudgetController
from tf_kfacprune.training.kfac_model import KFACModel
from tf_kfacprune.training.prunable_model import PrunableModel

__all__ = ["BudgetController", "KFACModel", "PrunableModel"]
