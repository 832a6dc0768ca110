"""Compaction: from a gated network to a small, equal, ordinary Keras model."""

from tf_kfacprune.compaction.compact import compact, compaction_report
from tf_kfacprune.compaction.verification import parity_error, random_inputs, verify_parity

__all__ = ["compact", "compaction_report", "parity_error", "random_inputs", "verify_parity"]
