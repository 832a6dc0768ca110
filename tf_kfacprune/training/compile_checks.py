"""What `compile` refuses, and what it warns of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import CompiledObjective
from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["check_losses", "explained_losses", "warn_of_labels", "warn_of_trainable"]

_NAMED = 3  # variables that a warning lists


@contextmanager
def explained_losses() -> Iterator[None]:
    """Says what helps where a loss failed inside of a compiled step for the size of its batch.

    Raises:
        InvalidArgumentError: If so.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        text = str(error)
        if "compile_loss" not in text or "shape" not in text.lower():
            raise
        raise InvalidArgumentError(
            f"A loss failed inside of the training step: {text.splitlines()[0]} Curvature is "
            "computed on a part of the batch. If the loss counts on a fixed batch size, pass "
            "batch_fraction=1 to whatever looks at curvature: the optimizer KFAC, the policy "
            "KFACSaliency, the penalty SpectralRadius."
        ) from error


def check_losses(objective: CompiledObjective) -> None:
    """Refuses losses whose curvature the optimizer `KFAC` could not use.

    Args:
        objective: What the model was compiled with.

    Raises:
        InvalidArgumentError: If there is no loss, or one that is not a mean over the batch.
    """
    losses = objective.losses()
    if not losses:
        raise InvalidArgumentError(
            "KFAC takes its curvature from the loss that is given to `compile`. Received: "
            "loss=None. Pass a loss; what layers add by add_loss has no likelihood."
        )
    for loss in losses:
        if getattr(loss, "reduction", None) in ("sum", "none"):
            raise InvalidArgumentError(
                "KFAC needs losses that are means over the batch: steps would be too long or "
                f"too short by its size. Received: {type(loss).__name__} with reduction="
                f"{loss.reduction!r}. Use the default, 'sum_over_batch_size'."
            )


def warn_of_labels(name: str, objective: CompiledObjective, users: Sequence[Any]) -> None:
    """Warns where labels cannot be sampled, so that those of the data take their place.

    Args:
        name: Name of the model.
        objective: What the model was compiled with.
        users: Whatever looks at curvature, with its `labels`.
    """
    users = [user for user in users if user.labels != "data"]
    reasons = objective.reasons()
    if users and reasons:
        warnings.warn(
            f"{' and '.join(type(user).__name__ for user in users)} of {name!r} fall back on the "
            f"empirical Fisher (labels='data'): {'; '.join(reasons)}.",
            stacklevel=3,
        )


def warn_of_trainable(
    name: str, trained: Sequence[keras.Variable], trainable: Sequence[keras.Variable]
) -> None:
    """Warns of layers that were frozen or freed since `compile`, which decides what is trained.

    Args:
        name: Name of the model.
        trained: What the optimizer was built for.
        trainable: What would be trained if the model were compiled now.
    """
    changed = []
    for verb, old, new in (("frozen", trained, trainable), ("freed", trainable, trained)):
        kept = {id(variable) for variable in new}
        paths = [variable.path for variable in old if id(variable) not in kept]
        if paths:
            more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
            changed.append(
                f"{', '.join(paths[:_NAMED])}{more} {'were' if len(paths) > 1 else 'was'} {verb}"
            )
    if changed:
        warnings.warn(
            f"Since {name!r} was compiled, {'; '.join(changed)}. That does not "
            "change what is trained: set `trainable` first, and then call `compile` with a new "
            "optimizer.",
            stacklevel=3,
        )
