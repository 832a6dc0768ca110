"""One training step on several replicas: branches with all-reduces in them, sums, weighted means.

A step is traced once per replica, in a thread each, and the threads meet at every all-reduce. Two
things follow that one device does not know. A branch of `tf.cond` is a graph of its own in which
the threads cannot meet, so branches have to be opened for all replicas at once (`cond`). And what
a replica leaves on a shared Python object may be met by another replica's thread (`ReplicaLocal`).

Without a strategy every function here is the plain TensorFlow operation, or nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

__all__ = [
    "ReplicaLocal",
    "cond",
    "num_replicas",
    "replica_id",
    "sum_over_replicas",
    "weighted_mean",
]

Branch = Callable[[], Any]


def num_replicas() -> int:
    """Replicas that take the current step together."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def replica_id() -> Any:
    """Number of this replica among those of all workers, a scalar int32 tensor."""
    context = tf.distribute.get_replica_context()
    return tf.constant(0) if context is None else context.replica_id_in_sync_group


def cond(predicate: Any, true_fn: Branch, false_fn: Branch) -> Any:
    """`tf.cond` with branches that may all-reduce.

    Args:
        predicate: Boolean scalar tensor, equal on all replicas.
        true_fn: Called without arguments in replica context.
        false_fn: Likewise.

    Returns:
        What the branch returned on this replica: None, or a list of tensors.
    """
    if not tf.distribute.has_strategy():  # one of a single replica merges, too
        return tf.cond(predicate, true_fn, false_fn)
    context = tf.distribute.get_replica_context()
    return context.merge_call(_cond_of_all_replicas, args=(predicate, true_fn, false_fn))


def _cond_of_all_replicas(strategy: Any, predicate: Any, true_fn: Any, false_fn: Any) -> Any:
    """`cond` seen from outside of the replicas: every argument holds one value per replica."""

    def on_each_replica(branches: Any) -> Branch:
        def run() -> Any:
            returned = strategy.extended.call_for_each_replica(_call, args=(branches,))
            # tf.cond knows no values that differ between replicas, but lists of tensors.
            return [strategy.experimental_local_results(value) for value in returned]

        return run

    def one_per_replica(copies: Any) -> Any:
        values = iter(copies)
        return strategy.experimental_distribute_values_from_function(lambda _: next(values))

    predicate = strategy.experimental_local_results(predicate)[0]
    returned = tf.cond(predicate, on_each_replica(true_fn), on_each_replica(false_fn))
    return [one_per_replica(copies) for copies in returned] or None


@tf.autograph.experimental.do_not_convert
def _call(branch: Branch) -> list[Any]:
    returned = branch()
    # A tensor from outside of the branch would be the same object on all replicas.
    return [tf.identity(value) for value in returned] if isinstance(returned, list) else []


def sum_over_replicas(tensors: Sequence[Any]) -> list[Any]:
    """Sums each tensor over the replicas; None stays None.

    Args:
        tensors: Tensors of the same shapes on all replicas.
    """
    context = tf.distribute.get_replica_context()
    if num_replicas() == 1 or context is None:
        return list(tensors)
    given = [tf.convert_to_tensor(tensor) for tensor in tensors if tensor is not None]
    summed = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, given) if given else ())
    return [None if tensor is None else next(summed) for tensor in tensors]


def weighted_mean(tensors: Sequence[Any], examples: Any) -> list[Any]:
    """Mean over the replicas, each counting as many times as it has examples.

    That makes the mean over a batch out of means over its parts, however uneven these are. What a
    replica without examples says is left out, NaN or not.

    Args:
        tensors: Floating-point tensors of the same shapes on all replicas.
        examples: Number of examples of this replica, a scalar tensor.
    """
    if num_replicas() == 1:
        return list(tensors)
    weight = tf.cast(examples, "float32")
    parts = [tf.math.multiply_no_nan(t, tf.cast(weight, t.dtype)) for t in tensors]
    *summed, total = sum_over_replicas([*parts, weight])
    return [tf.math.divide_no_nan(s, tf.cast(total, s.dtype)) for s in summed]


class ReplicaLocal:
    """A Python value that every replica has for itself; None where none was set."""

    def __init__(self) -> None:
        self._values: dict[int, Any] = {}

    @property
    def value(self) -> Any:
        """The value of the replica that asks."""
        return self._values.get(self._replica())

    @value.setter
    def value(self, value: Any) -> None:
        self._values[self._replica()] = value

    @staticmethod
    def _replica() -> int:
        return int(tf.get_static_value(replica_id()))
