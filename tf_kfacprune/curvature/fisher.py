r"""Likelihoods that the usual losses stand for, with labels sampled from the model itself.

The true Fisher is `E_x E_{y ~ p(y | x)} [grad log p grad log p^T]`: labels are drawn from the
model's own prediction. With the labels of the data one gets the empirical Fisher, which vanishes
as the fit gets good and is no curvature then.

References:
    Martens & Grosse 2015, section 2.2. Kunstner, Balles, Hennig 2019, "Limitations of the
    Empirical Fisher Approximation".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

__all__ = ["SampledLikelihood", "sampled_likelihood"]

SampledLikelihood = Callable[[Any, Any], Any]
"""`(prediction, seed) -> scalar`: mean negative log-likelihood of labels drawn from the model."""

_EPSILON = 1e-7


def _fisher_mean(terms: Any) -> Any:
    """Averages independent terms so that their Fisher is that of a loss which is their mean.

    A loss that averages over D outputs has the Hessian of one term divided by D; gradients of the
    sum must hence be scaled by 1/sqrt(D), not by 1/D.
    """
    batch = ops.cast(ops.shape(terms)[0], "float32")
    per_example = ops.cast(ops.size(terms), "float32") / batch
    return ops.sum(terms) / (batch * ops.sqrt(per_example))


def _softmax_nll(logits: Any, seed: Any) -> Any:
    logits = ops.cast(logits, "float32")
    classes = logits.shape[-1]
    flat = ops.reshape(ops.stop_gradient(logits), (-1, classes))
    drawn = ops.reshape(keras.random.categorical(flat, 1, seed=seed), ops.shape(logits)[:-1])
    one_hot = ops.one_hot(drawn, classes)
    return _fisher_mean(-ops.sum(one_hot * ops.log_softmax(logits), axis=-1))


def _probabilities_nll(probabilities: Any, seed: Any) -> Any:
    probabilities = ops.cast(probabilities, "float32")
    total = ops.sum(probabilities, axis=-1, keepdims=True)
    return _softmax_nll(ops.log(ops.clip(probabilities / total, _EPSILON, 1.0)), seed)


def _sigmoid_nll(logits: Any, seed: Any) -> Any:
    logits = ops.cast(logits, "float32")
    noise = keras.random.uniform(ops.shape(logits), seed=seed)
    drawn = ops.cast(noise < ops.sigmoid(ops.stop_gradient(logits)), "float32")
    return _fisher_mean(ops.binary_crossentropy(drawn, logits, from_logits=True))


def _bernoulli_nll(probabilities: Any, seed: Any) -> Any:
    p = ops.clip(ops.cast(probabilities, "float32"), _EPSILON, 1.0 - _EPSILON)
    return _sigmoid_nll(ops.log(p) - ops.log(1.0 - p), seed)


def _gaussian_nll(prediction: Any, seed: Any) -> Any:
    """Likelihood whose Fisher is the Gauss-Newton matrix of the mean squared error."""
    prediction = ops.cast(prediction, "float32")
    noise = keras.random.normal(ops.shape(prediction), seed=seed)
    return math.sqrt(2.0) * _fisher_mean(noise * prediction)


_Loss = keras.losses.Loss
_CROSS_ENTROPIES = {
    "categorical_crossentropy": (_probabilities_nll, _softmax_nll),
    "sparse_categorical_crossentropy": (_probabilities_nll, _softmax_nll),
    "binary_crossentropy": (_bernoulli_nll, _sigmoid_nll),
}
_LOSS_CLASSES: dict[type, str] = {
    keras.losses.CategoricalCrossentropy: "categorical_crossentropy",
    keras.losses.SparseCategoricalCrossentropy: "sparse_categorical_crossentropy",
    keras.losses.BinaryCrossentropy: "binary_crossentropy",
    keras.losses.MeanSquaredError: "mean_squared_error",
}


def sampled_likelihood(loss: Any) -> SampledLikelihood | str:
    """The likelihood that a Keras loss stands for.

    Args:
        loss: A loss as given to `compile`: name, function or `keras.losses.Loss`.

    Returns:
        A `SampledLikelihood`, or, as text, the reason why the loss has none that is known here.
    """
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    name = _LOSS_CLASSES.get(type(loss)) or getattr(loss, "__name__", type(loss).__name__)
    if name in _CROSS_ENTROPIES:
        from_probabilities, from_logits = _CROSS_ENTROPIES[name]
        config = loss.get_config() if isinstance(loss, _Loss) else {}
        return from_logits if config.get("from_logits", False) else from_probabilities
    if name == "mean_squared_error":
        return _gaussian_nll
    return f"loss {name!r} has no known likelihood to sample labels from"
