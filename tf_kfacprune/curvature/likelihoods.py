r"""Likelihoods that the usual losses stand for, by the coordinates in which their Fisher is flat.

=========  ================================================================  ==============
symbol     meaning                                                           shape
=========  ================================================================  ==============
`f`        prediction of the network for one entry (an example, a token)     (D,)
`phi(f)`   coordinates in which the Fisher metric is the Euclidean one       (D,)
`J`        derivative of phi by f                                            (D, D)
=========  ================================================================  ==============

The Fisher of an entry is `E_y [grad log p(y | f) grad log p(y | f)^T] = J^T J`:

    categorical  2 sqrt(p)             Bernoulli  2 arcsin sqrt(p)
    Gaussian     sqrt(2) f (the loss is `(f - y)^2`)      Poisson  2 sqrt(rate)

One function serves every use of the Fisher. Gradients of `eps . phi` with normal eps have its
second moments, as those of labels drawn from the model have; their derivatives by the weights are
those of the Fisher, too, which drawn labels do not give, for the draw has no derivative. Gradients
of the single coordinates make it up exactly. `|J d|^2` is its product with a direction d.

References:
    Martens & Grosse 2015, section 2.2 (labels from the model). Kass & Vos 1997, "Geometrical
    Foundations of Asymptotic Inference" (square-root coordinates). Kunstner, Balles, Hennig 2019,
    "Limitations of the Empirical Fisher Approximation".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

__all__ = ["Likelihood", "likelihood_of"]

# Probabilities are kept this far from 0 and 1, as Keras does in its cross entropies.
_EPSILON = 1e-7


@dataclass(frozen=True)
class Likelihood:
    """What a loss says about predictions.

    Attributes:
        coordinates: phi, from a tensor of predictions to one of the same shape.
        is_mean: Whether the loss is a mean over the entries of the last axis.
    """

    coordinates: Callable[[Any], Any]
    is_mean: bool


def _of_logits(logits: Any) -> Any:
    return 2.0 * ops.exp(0.5 * ops.log_softmax(logits))


def _of_probabilities(probabilities: Any) -> Any:
    p = probabilities / ops.sum(probabilities, axis=-1, keepdims=True)
    return 2.0 * ops.exp(0.5 * ops.log(ops.clip(p, _EPSILON, 1.0)))


def _of_log_odds(log_odds: Any) -> Any:
    # 2 arcsin sqrt(sigmoid(l)), in a form that is finite, with its derivatives, for any l.
    opened, closed = (ops.exp(0.5 * ops.log_sigmoid(sign * log_odds)) for sign in (1.0, -1.0))
    return 2.0 * ops.arctan2(opened, closed)


def _of_bernoulli_probability(probability: Any) -> Any:
    p = ops.clip(probability, _EPSILON, 1.0 - _EPSILON)
    return _of_log_odds(ops.log(p) - ops.log(1.0 - p))


def _of_mean(mean: Any) -> Any:
    return math.sqrt(2.0) * mean


def _of_rate(rate: Any) -> Any:
    return 2.0 * ops.sqrt(ops.relu(rate) + _EPSILON)


_CATEGORICAL = (Likelihood(_of_probabilities, False), Likelihood(_of_logits, False))
_LIKELIHOODS: dict[str, tuple[Likelihood, Likelihood]] = {  # from predictions, from logits
    "categorical_crossentropy": _CATEGORICAL,
    "sparse_categorical_crossentropy": _CATEGORICAL,
    "binary_crossentropy": (
        Likelihood(_of_bernoulli_probability, True),
        Likelihood(_of_log_odds, True),
    ),
    "mean_squared_error": (Likelihood(_of_mean, True),) * 2,
    "poisson": (Likelihood(_of_rate, True),) * 2,
}
_LOSS_CLASSES: dict[type, str] = {
    keras.losses.CategoricalCrossentropy: "categorical_crossentropy",
    keras.losses.SparseCategoricalCrossentropy: "sparse_categorical_crossentropy",
    keras.losses.BinaryCrossentropy: "binary_crossentropy",
    keras.losses.MeanSquaredError: "mean_squared_error",
    keras.losses.Poisson: "poisson",
}
# What calls `fn`, in all of these classes and in the one that Keras wraps functions in.
_CALL = keras.losses.MeanSquaredError.call


def likelihood_of(loss: Any) -> Likelihood | str:
    """The likelihood that a Keras loss stands for.

    Args:
        loss: A loss as given to `compile`: name, function or `keras.losses.Loss`.

    Returns:
        A `Likelihood`, or, as text, the reason why the loss has none that is known here.
    """
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    # Keras wraps functions in objects that keep them as `fn`.
    function = loss if type(loss) in _LOSS_CLASSES else getattr(loss, "fn", loss)
    name = _LOSS_CLASSES.get(type(loss)) or getattr(function, "__name__", type(loss).__name__)
    if name not in _LIKELIHOODS:
        return f"loss {name!r} has no known likelihood to sample labels from"
    if type(loss) not in _LOSS_CLASSES and function is not keras.losses.get(name):
        return f"loss {name!r} is not the function of that name in Keras"
    if isinstance(loss, keras.losses.Loss) and type(loss).call is not _CALL:
        return f"loss {type(loss).__name__!r} has a `call` of its own"
    config = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    if config.get("axis", -1) != -1:
        return f"loss {name!r} has its classes on axis {config['axis']}, not on the last one"
    return _LIKELIHOODS[name][bool(config.get("from_logits", False))]


def expects_probabilities(loss: Any) -> bool:
    """Whether a Keras loss is a cross entropy of probabilities, not of logits.

    Args:
        loss: A loss as given to `compile`: name, function or `keras.losses.Loss`.
    """
    found = likelihood_of(loss)
    of_probabilities = (_of_probabilities, _of_bernoulli_probability)
    return isinstance(found, Likelihood) and found.coordinates in of_probabilities
