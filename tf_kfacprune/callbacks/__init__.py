"""Keras callbacks: the pruning of a network in TensorBoard, while it happens."""

from tf_kfacprune.callbacks.pruning_log import PruningLog

__all__ = ["PruningLog"]
