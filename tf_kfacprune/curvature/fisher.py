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

from tf_kfacprune.errors import InvalidArgumentError

__all__ = [
    "ExactLikelihoods",
    "SampledLikelihood",
    "exact_likelihoods",
    "log_odds",
    "sampled_likelihood",
]

SampledLikelihood = Callable[[Any, Any], Any]
"""`(prediction, seed) -> scalar`: mean negative log-likelihood of labels drawn from the model."""

ExactLikelihoods = Callable[[Any], list[Any]]
"""`prediction -> scalars` whose per-example gradients' outer products sum to the Fisher."""

_EPSILON = 1e-7
_MOST_OUTPUTS = 256  # beyond, one backward pass per output is no option any more


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


def _log_of_probabilities(probabilities: Any) -> Any:
    probabilities = ops.cast(probabilities, "float32")
    total = ops.sum(probabilities, axis=-1, keepdims=True)
    return ops.log(ops.clip(probabilities / total, _EPSILON, 1.0))


def log_odds(probabilities: Any) -> Any:
    """Logits of probabilities, finite also at 0 and 1."""
    p = ops.clip(probabilities, _EPSILON, 1.0 - _EPSILON)
    return ops.log(p) - ops.log(1.0 - p)


def _probabilities_nll(probabilities: Any, seed: Any) -> Any:
    return _softmax_nll(_log_of_probabilities(probabilities), seed)


def _sigmoid_nll(logits: Any, seed: Any) -> Any:
    logits = ops.cast(logits, "float32")
    noise = keras.random.uniform(ops.shape(logits), seed=seed)
    drawn = ops.cast(noise < ops.sigmoid(ops.stop_gradient(logits)), "float32")
    return _fisher_mean(ops.binary_crossentropy(drawn, logits, from_logits=True))


def _bernoulli_nll(probabilities: Any, seed: Any) -> Any:
    return _sigmoid_nll(log_odds(ops.cast(probabilities, "float32")), seed)


def _gaussian_nll(prediction: Any, seed: Any) -> Any:
    """Likelihood whose Fisher is the Gauss-Newton matrix of the mean squared error."""
    prediction = ops.cast(prediction, "float32")
    noise = keras.random.normal(ops.shape(prediction), seed=seed)
    return math.sqrt(2.0) * _fisher_mean(noise * prediction)


def _poisson_nll(rate: Any, seed: Any) -> Any:
    """The gradient of `rate - y log rate` is `1 - y / rate`, y drawn with mean and variance rate.

    Only mean and variance of y matter for the Fisher, so a normal y of the same two serves.
    """
    rate = ops.maximum(ops.cast(rate, "float32"), _EPSILON)
    noise = keras.random.normal(ops.shape(rate), seed=seed)
    return _fisher_mean(noise * rate * _fixed(ops.rsqrt(rate)))


def _fixed(tensor: Any) -> Any:
    return ops.stop_gradient(tensor)


def _by_output(weighted: Any) -> list[Any]:
    """One mean per output of terms of shape `(batch, outputs)`, each output's term by itself."""
    outputs = weighted.shape[-1]
    scale = 1.0 / math.sqrt(outputs)
    return [ops.mean(weighted[:, k]) * scale for k in range(outputs)]


def _softmax_exact(logits: Any) -> list[Any]:
    """`sqrt(p_c) log p_c` for each class c: the Fisher is the mean over labels drawn from p."""
    logits = ops.cast(logits, "float32")
    weight = _fixed(ops.sqrt(ops.softmax(logits)))
    weighted = weight * ops.log_softmax(logits)
    return [ops.mean(weighted[:, k]) for k in range(weighted.shape[-1])]


def _probabilities_exact(probabilities: Any) -> list[Any]:
    return _softmax_exact(_log_of_probabilities(probabilities))


def _sigmoid_exact(logits: Any) -> list[Any]:
    logits = ops.cast(logits, "float32")
    p = _fixed(ops.sigmoid(logits))
    return _by_output(ops.sqrt(p * (1.0 - p)) * logits)


def _bernoulli_exact(probabilities: Any) -> list[Any]:
    return _sigmoid_exact(log_odds(ops.cast(probabilities, "float32")))


def _gaussian_exact(prediction: Any) -> list[Any]:
    return _by_output(math.sqrt(2.0) * ops.cast(prediction, "float32"))


def _poisson_exact(rate: Any) -> list[Any]:
    rate = ops.maximum(ops.cast(rate, "float32"), _EPSILON)
    return _by_output(rate * _fixed(ops.rsqrt(rate)))


_Loss = keras.losses.Loss
# name -> (sampled, exact) from predictions, and the same from logits
_LIKELIHOODS: dict[str, tuple[tuple[Any, Any], tuple[Any, Any]]] = {
    **dict.fromkeys(
        ("categorical_crossentropy", "sparse_categorical_crossentropy"),
        ((_probabilities_nll, _probabilities_exact), (_softmax_nll, _softmax_exact)),
    ),
    "binary_crossentropy": ((_bernoulli_nll, _bernoulli_exact), (_sigmoid_nll, _sigmoid_exact)),
    "mean_squared_error": ((_gaussian_nll, _gaussian_exact), (_gaussian_nll, _gaussian_exact)),
    "poisson": ((_poisson_nll, _poisson_exact), (_poisson_nll, _poisson_exact)),
}
_LOSS_CLASSES: dict[type, str] = {
    keras.losses.CategoricalCrossentropy: "categorical_crossentropy",
    keras.losses.SparseCategoricalCrossentropy: "sparse_categorical_crossentropy",
    keras.losses.BinaryCrossentropy: "binary_crossentropy",
    keras.losses.MeanSquaredError: "mean_squared_error",
    keras.losses.Poisson: "poisson",
}


def _likelihoods(loss: Any) -> tuple[Any, Any] | str:
    """Sampled and exact likelihood of a Keras loss, or the reason why it has none."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    name = _LOSS_CLASSES.get(type(loss)) or getattr(loss, "__name__", type(loss).__name__)
    if name not in _LIKELIHOODS:
        return f"loss {name!r} has no known likelihood to sample labels from"
    from_predictions, from_logits = _LIKELIHOODS[name]
    config = loss.get_config() if isinstance(loss, _Loss) else {}
    return from_logits if config.get("from_logits", False) else from_predictions


def sampled_likelihood(loss: Any) -> SampledLikelihood | str:
    """The likelihood that a Keras loss stands for.

    Args:
        loss: A loss as given to `compile`: name, function or `keras.losses.Loss`.

    Returns:
        A `SampledLikelihood`, or, as text, the reason why the loss has none that is known here.
    """
    found = _likelihoods(loss)
    return found if isinstance(found, str) else found[0]


def exact_likelihoods(loss: Any) -> ExactLikelihoods:
    """Likelihoods that make up the Fisher without sampling, for few outputs.

    Args:
        loss: A loss that has a `sampled_likelihood`.

    Returns:
        An `ExactLikelihoods`. It takes predictions of shape `(batch, outputs)`, one gradient each.

    Raises:
        InvalidArgumentError: If the loss has no likelihood; when called, if the predictions have
            another shape or too many outputs.
    """
    found = _likelihoods(loss)
    if isinstance(found, str):
        raise InvalidArgumentError(f"labels='exact' is not possible: {found}.")
    exact = found[1]

    def checked(prediction: Any) -> list[Any]:
        shape = prediction.shape
        if len(shape) != 2 or shape[-1] is None or shape[-1] > _MOST_OUTPUTS:
            raise InvalidArgumentError(
                "labels='exact' takes one backward pass per output and needs predictions of shape "
                f"(batch, outputs) with at most {_MOST_OUTPUTS} outputs. Received: predictions of "
                f"shape {tuple(shape)}. Use labels='sampled'."
            )
        return exact(prediction)

    return checked
