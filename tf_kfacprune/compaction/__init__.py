"""Compaction: from a gated network to a small, equal, ordinary Keras model."""

from tf_kfacprune.compaction.compact import compact, compaction_report, missed_budget
from tf_kfacprune.compaction.compensation import Compensation, compensate
from tf_kfacprune.compaction.readers import LayerCompensation
from tf_kfacprune.compaction.verification import parity_error, random_inputs, verify_parity
from tf_kfacprune.compaction.working_copy import WorkingCopy

__all__ = [
    "Compensation",
    "LayerCompensation",
    "WorkingCopy",
    "compact",
    "compaction_report",
    "compensate",
    "missed_budget",
    "parity_error",
    "random_inputs",
    "verify_parity",
]
