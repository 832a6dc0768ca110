"""Data sets: the embedded default, the usual benchmarks, a user's own ``.npz`` file; batches."""

from tf_kfacprune.data.batching import batches
from tf_kfacprune.data.dataset import Dataset, validation_split
from tf_kfacprune.data.loading import NAMES, load

__all__ = ["NAMES", "Dataset", "batches", "load", "validation_split"]
