"""Networks by name, for the command line and benchmarks."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence

import keras

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.zoo.mlperf_tiny import ds_cnn, fc_autoencoder, mobilenet_v1_025, resnet8
from tf_kfacprune.zoo.networks import digits_cnn, lenet5, lenet300, mobilenetv2, resnet20

__all__ = ["NAMES", "build"]

_BUILDERS: dict[str, tuple[Callable[..., keras.Model], tuple[int, ...]]] = {
    "digits_cnn": (digits_cnn, (8, 8, 1)),
    "ds_cnn": (ds_cnn, (49, 10, 1)),
    "fc_autoencoder": (fc_autoencoder, (640,)),
    "lenet300": (lenet300, (28, 28, 1)),
    "lenet5": (lenet5, (28, 28, 1)),
    "mobilenet_v1_025": (mobilenet_v1_025, (96, 96, 3)),
    "mobilenetv2": (mobilenetv2, (32, 32, 3)),
    "resnet20": (resnet20, (32, 32, 3)),
    "resnet8": (resnet8, (32, 32, 3)),
}
NAMES = tuple(_BUILDERS)


def build(
    name: str,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    seed: int | None = None,
) -> keras.Model:
    """Builds a network by name.

    Args:
        name: One of ``NAMES``.
        input_shape: Shape of one example; by default the one that it was designed for.
        num_classes: Number of logits; by default as many classes as it was designed for. To be
            left out for an autoencoder.
        seed: Seed of the initial weights, or None for random ones.

    Returns:
        A built Functional model.

    Raises:
        InvalidArgumentError: If there is no such network, the shape does not fit it, or it has no
            classes.

    Examples:
        >>> build("lenet300").count_params()
        266610
    """
    builder, default = _entry(name)
    shape = tuple(default if input_shape is None else input_shape)
    options = {} if num_classes is None else {"num_classes": num_classes}
    if options and "num_classes" not in inspect.signature(builder).parameters:
        raise InvalidArgumentError(
            f"Network {name!r} puts out its own input and has no classes. Received: "
            f"num_classes={num_classes}. Leave num_classes out and train it with the examples as "
            "their own targets, or choose another network for data with labels."
        )
    try:
        return builder(shape, seed=seed, **options)
    except ValueError as error:  # Keras: wrong rank, or nothing left after pooling
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgumentError(
            f"Network {name!r} cannot be built for examples of shape {shape}: {reason} "
            f"It was designed for {default}."
        ) from error


def _entry(name: str) -> tuple[Callable[..., keras.Model], tuple[int, ...]]:
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise InvalidArgumentError(
            f"Unknown network {name!r}."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Expected one of {', '.join(NAMES)}."
        )
    return _BUILDERS[name]
