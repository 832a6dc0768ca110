"""What a model and `compile` are refused for, and what is warned of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import CompiledObjective, expects_probabilities
from tf_kfacprune.errors import DataError, InvalidArgumentError
from tf_kfacprune.graph import maker_of

__all__ = [
    "check_losses",
    "explained_losses",
    "warn_of_changed_freezing",
    "warn_of_labels",
    "warn_of_logits",
    "warn_of_own_steps",
]

_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


@contextmanager
def explained_losses() -> Iterator[None]:
    """Says what helps where a loss failed inside of a step.

    Raises:
        DataError: If it was for class numbers that the network has no output for.
        InvalidArgumentError: If it was for the size of its batch.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        text = str(error)
        wrong = re.search(r"Received a label value of .*", text)
        if wrong:
            raise DataError(
                f"Labels must be class numbers. {wrong[0]} (of one batch). The network has one "
                "output for each class, from 0 up."
            ) from error
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


def warn_of_changed_freezing(
    name: str, trainable: Sequence[keras.Variable], trained: Sequence[keras.Variable]
) -> None:
    """Warns of layers whose `trainable` was set after `compile`, which does nothing.

    Args:
        name: Name of the model.
        trainable: Variables that are trainable now.
        trained: Those that were when the model was compiled.
    """
    before, now = ({id(v): v.path for v in variables} for variables in (trained, trainable))
    for keys, what in [(before.keys() - now, "trained on"), (now.keys() - before, "not trained")]:
        if keys:
            paths = sorted({**before, **now}[key] for key in keys)
            warnings.warn(
                f"`trainable` was set after {name!r} was compiled, so that these weights are {what}"
                f" nevertheless: {', '.join(paths[:5])}{', ...' * (len(paths) > 5)}. Call "
                "`compile` again.",
                stacklevel=4,
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


def warn_of_own_steps(owner: str, model: keras.Model) -> None:
    """Warns of methods of the user's model that nobody calls once it is wrapped.

    Args:
        owner: Name of the class that wraps it.
        model: The user's model.
    """
    own = [name for name in _STEPS if getattr(type(model), name) is not getattr(keras.Model, name)]
    if own:
        warnings.warn(
            f"Model {model.name!r} ({type(model).__name__}) has its own {', '.join(own)}, which "
            f"{owner} does not call: it trains and evaluates the network's outputs with the loss "
            "and metrics of its own `compile`. Put what the loss needs into a loss function or "
            "into layers (`add_loss`), or override these methods in a subclass of "
            f"{owner}.",
            stacklevel=3,
        )


def warn_of_logits(name: str, net: keras.Model, loss: Any) -> None:
    """Warns of cross entropies of probabilities on outputs that can be any number.

    Args:
        name: Name of the model.
        net: The network.
        loss: As given to `compile`: one for each output, in a list or by name, or one for all.
    """
    if not getattr(net, "outputs", None):  # a subclassed model has no list of them
        return
    for output, of_output in zip(net.outputs, _losses_of_outputs(net, loss), strict=False):
        layer = maker_of(output)
        is_linear = getattr(layer, "activation", None) is keras.activations.linear
        if of_output is not None and is_linear and expects_probabilities(of_output):
            text = getattr(of_output, "name", getattr(of_output, "__name__", of_output))
            warnings.warn(
                f"Loss {text!r} of {name!r} expects probabilities, but its output is what layer "
                f"{layer.name!r} ({type(layer).__name__}) computes without an activation: logits, "
                "which can be any number. Pass the loss with from_logits=True, such as "
                "keras.losses.SparseCategoricalCrossentropy(from_logits=True), or end the network "
                "in a softmax or sigmoid.",
                stacklevel=3,
            )


def _losses_of_outputs(net: keras.Model, loss: Any) -> list[Any]:
    """The losses of `net.outputs`, one by one; nothing where it is not plain which is whose."""
    if not isinstance(loss, dict | list | tuple):
        return [loss] * len(net.outputs)
    shapes = net.compute_output_shape(net.input_shape)
    if isinstance(loss, dict):
        # Keras flattens a dictionary of outputs in the order of its sorted keys.
        names = sorted(shapes) if isinstance(shapes, dict) else net.output_names
        losses = [loss.get(name) for name in names]
    else:
        losses = [] if isinstance(shapes, dict) else list(loss)
    return losses if len(losses) == len(net.outputs) else []
