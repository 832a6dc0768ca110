"""Random numbers that differ between replicas."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.distribution.replicas import num_replicas, replica_id

__all__ = ["ReplicaSeedGenerator"]

_STRIDE = 0x3C6EF372  # far from the small increments by which the generator itself counts


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A seed generator whose states are equal on all replicas, but not the seeds it gives.

    Keras' own generator would draw the same labels for the first example of every replica.
    """

    def next(self, ordered: bool = True) -> Any:
        seed = super().next(ordered=ordered)
        if num_replicas() == 1:
            return seed
        shift = tf.cast(replica_id(), seed.dtype) * tf.cast(_STRIDE, seed.dtype)
        return seed + tf.stack([shift, tf.zeros_like(shift)])
