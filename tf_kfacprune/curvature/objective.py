"""A Keras loss as the objective of curvature diagnostics: a sum over examples of their losses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tf_kfacprune.curvature.fisher import log_odds
from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["Objective"]

_EPSILON = 1e-7

Link = Callable[[Any], Any]


def _log_probabilities(probabilities: Any) -> Any:
    return ops.log(ops.maximum(probabilities, _EPSILON))


_LINKS: dict[str, Link] = {
    "categorical_crossentropy": _log_probabilities,
    "sparse_categorical_crossentropy": _log_probabilities,
    "binary_crossentropy": log_odds,
}
_LINK_OF_CLASS: dict[type, Link] = {
    keras.losses.CategoricalCrossentropy: _log_probabilities,
    keras.losses.SparseCategoricalCrossentropy: _log_probabilities,
    keras.losses.BinaryCrossentropy: log_odds,
}


class Objective:
    """Sum over the examples of a batch of their losses, and the same at natural parameters.

    The Gauss-Newton matrix depends on where the network ends and the loss begins. For cross
    entropies it is taken at the natural parameters (logits), where it equals the Fisher. A model
    that puts out probabilities is treated as ending there as well: ``log p`` equals its logits up
    to a constant, which cross entropy does not see.

    Args:
        loss: A loss as given to `compile`: name, function ``(y_true, y_pred) -> loss per example``
            (or their mean), or `keras.losses.Loss`.
        weight: What it is multiplied by.

    Raises:
        InvalidArgumentError: If ``loss`` is none of these.
    """

    def __init__(self, loss: Any, weight: float = 1.0) -> None:
        if isinstance(loss, str):
            loss = _named_loss(loss)
        if not callable(loss):
            raise InvalidArgumentError(
                "loss must be the name of a Keras loss, a keras.losses.Loss or a function "
                f"(y_true, y_pred). Received: loss={loss!r}"
            )
        self._loss = loss
        self._weight = weight
        self._natural_loss, self._link = _at_natural_parameters(loss)

    def sum(self, y: Any, prediction: Any) -> Any:
        """Sum of the examples' losses.

        Args:
            y: Labels of the batch.
            prediction: The model's output for it, shape ``(batch, ...)``.

        Returns:
            Scalar.
        """
        return self._weight * _summed(self._loss, y, prediction)

    def natural_parameters(self, prediction: Any) -> Any:
        """Where the network ends for the Gauss-Newton matrix: logits, or the output itself."""
        if keras.backend.standardize_dtype(prediction.dtype) in ("float16", "bfloat16"):
            prediction = ops.cast(prediction, "float32")  # 1 - 1e-7 would be 1
        return self._link(prediction)

    def sum_at(self, y: Any, natural: Any) -> Any:
        """`sum`, as a function of the natural parameters."""
        return self._weight * _summed(self._natural_loss, y, natural)


def _named_loss(name: str) -> Callable[..., Any]:
    try:
        return keras.losses.get(name)
    except ValueError as error:
        raise InvalidArgumentError(f"loss {name!r} is not the name of a Keras loss.") from error


def _at_natural_parameters(loss: Any) -> tuple[Callable[..., Any], Link]:
    """The loss as a function of natural parameters, and the link from predictions to them."""
    if isinstance(loss, keras.losses.Loss):
        link = _LINK_OF_CLASS.get(type(loss))
        config = loss.get_config() if link else {}
        if link and not config.get("from_logits", False):
            return type(loss).from_config({**config, "from_logits": True}), link
        return loss, _identity
    link = _LINKS.get(getattr(loss, "__name__", ""))
    if link and "from_logits" in inspect.signature(loss).parameters:
        return functools.partial(loss, from_logits=True), link
    return loss, _identity


def _identity(prediction: Any) -> Any:
    return prediction


def _summed(loss: Callable[..., Any], y: Any, prediction: Any) -> Any:
    """Sum over examples; further axes of the losses (time, space) are averaged, as Keras does."""
    compute = loss.call if isinstance(loss, keras.losses.Loss) else loss
    values = compute(ops.convert_to_tensor(y), prediction)
    count = ops.shape(prediction)[0]
    if len(values.shape) == 0:
        return values * ops.cast(count, values.dtype)
    return ops.sum(ops.mean(ops.reshape(values, (count, -1)), axis=-1))
