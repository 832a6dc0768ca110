"""What training on several replicas asks for: checks, agreement, ways around Keras' gaps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import ForwardState
from tf_kfacprune.distribution import num_replicas, sum_over_replicas
from tf_kfacprune.errors import InvalidArgumentError, WorkerLostError
from tf_kfacprune.optimizers import KFAC
from tf_kfacprune.training.trainee import inner_optimizer

__all__ = [
    "agreed",
    "all_finite",
    "check_distributed",
    "is_multi_worker",
    "one_per_worker",
    "raise_lost_worker",
]

_STRATEGIES = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


def check_distributed(model: keras.Model, jit_compile: Any) -> None:
    """Refuses what does not work on several replicas.

    Args:
        model: A compiled model whose optimizer is not built yet.
        jit_compile: As given to `compile`.

    Raises:
        InvalidArgumentError: If something does not; it says what, and what to do instead.
    """
    strategy = model.distribute_strategy
    optimizer = inner_optimizer(model.optimizer)
    refused = (
        (
            not isinstance(strategy, _STRATEGIES),
            f"strategy {type(strategy).__name__}",
            "Use MirroredStrategy or MultiWorkerMirroredStrategy",
        ),
        (
            any(not isinstance(v.value, tf.distribute.DistributedValues) for v in model.variables),
            "a model whose variables live on one device",
            "Create the model, too, inside `with strategy.scope():`",
        ),
        (
            optimizer._distribution_strategy is not strategy,
            "an optimizer created outside of the strategy's scope",
            "Create it inside `with strategy.scope():`",
        ),
        (
            model.steps_per_execution > 1,
            f"steps_per_execution={model.steps_per_execution}",
            "Keras cannot do this under a strategy; leave it at 1",
        ),
        (
            jit_compile is True,
            "jit_compile=True",
            "Keras cannot do this under a strategy; leave it out",
        ),
        (
            bool(optimizer.ema_overwrite_frequency),
            f"ema_overwrite_frequency={optimizer.ema_overwrite_frequency}",
            "Keras cannot do this under a strategy; call `finalize_variable_values` after training",
        ),
        (
            bool(optimizer.gradient_accumulation_steps),
            f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps}",
            "Keras cannot do this under a strategy; use larger batches or more replicas",
        ),
        (
            isinstance(optimizer, KFAC) and _has_synchronized_normalization(model),
            "BatchNormalization(synchronized=True)",
            "Kronecker factors need passes that no other replica takes part in; leave it out",
        ),
    )
    for is_refused, what, remedy in refused:
        if is_refused:
            raise InvalidArgumentError(
                f"{type(model).__name__} {model.name!r} on {strategy.num_replicas_in_sync} "
                f"replicas of tf.distribute does not support {what}. {remedy}, or train on one "
                "device."
            )


def _has_synchronized_normalization(model: keras.Model) -> bool:
    return any(getattr(layer, "synchronized", False) for layer in model._flatten_layers())


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas of a strategy are spread over several processes."""
    replicas = strategy.num_replicas_in_sync
    return replicas > 1 and replicas > len(strategy.extended.worker_devices)


def one_per_worker(results: dict[str, Any]) -> dict[str, Any]:
    """Scalars as vectors of one entry: Keras averages over workers along an axis of results."""
    return {name: tf.reshape(value, [1]) for name, value in results.items()}


def agreed(
    gradients: Sequence[Any], finite: Any, examples: Any, before: ForwardState
) -> tuple[list[Any], Any]:
    """This replica's part of the gradient of the whole batch; whether all parts are finite.

    A replica without examples (in a small last batch) contributes nothing, and its pass leaves
    no trace: means over no examples are NaN. Where a loss scale is too high for one replica,
    all see it.

    Args:
        gradients: Of the mean loss over this replica's examples; None stays None.
        finite: Whether this replica may take the step, a boolean scalar tensor.
        examples: Number of this replica's examples, a scalar tensor.
        before: The network's state before the pass that gave the gradients.
    """
    idle = tf.equal(examples, 0)
    fine = all_finite(gradients)
    finite = tf.logical_or(finite, idle)
    # Not its seeds: all replicas have to draw the same gates in the next step.
    tf.cond(idle, before.restore_statistics, lambda: None)
    weight = tf.cast(examples, "float32")
    flags = [tf.cast(flag, "float32") for flag in (finite, tf.logical_or(fine, idle))]
    total, *agreeing = sum_over_replicas([weight, *flags])
    finite, fine = (tf.equal(count, float(num_replicas())) for count in agreeing)
    share = weight / tf.maximum(total, 1.0)
    poison = tf.where(fine, 0.0, math.nan)
    parts = [
        None
        if g is None
        else tf.math.multiply_no_nan(g, tf.cast(share, g.dtype)) + tf.cast(poison, g.dtype)
        for g in (None if g is None else tf.convert_to_tensor(g) for g in gradients)
    ]
    return parts, finite


def all_finite(gradients: Sequence[Any]) -> Any:
    """Whether all entries of all gradients are finite, a boolean scalar tensor."""
    sums = [tf.reduce_sum(tf.abs(tf.cast(g, "float32"))) for g in gradients if g is not None]
    return tf.math.is_finite(tf.add_n(sums))


@contextmanager
def raise_lost_worker(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Tells that another worker has died, which TensorFlow reports as a failed all-reduce.

    Raises:
        WorkerLostError: If so.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if not is_multi_worker(strategy) or not isinstance(error, _LOST):
            raise
        raise WorkerLostError(
            "Another worker of the training has died or cannot be reached, so the job cannot go "
            f"on. TensorFlow says: {str(error).splitlines()[0]} Start all workers again; with "
            "`keras.callbacks.BackupAndRestore` they go on from the last complete epoch."
        ) from error


_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.CancelledError,
)
