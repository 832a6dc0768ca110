"""What `tf.distribute` needs beyond Keras: branches, sums and values of the replicas of a step."""

from tf_kfacprune.distribution.replicas import (
    ReplicaLocal,
    cond,
    num_replicas,
    replica_id,
    sum_over_replicas,
    weighted_mean,
)
from tf_kfacprune.distribution.seeds import ReplicaSeedGenerator

__all__ = [
    "ReplicaLocal",
    "ReplicaSeedGenerator",
    "cond",
    "num_replicas",
    "replica_id",
    "sum_over_replicas",
    "weighted_mean",
]
