"""Which network a model stands for."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["HoldsNetwork", "network_of"]


class HoldsNetwork:
    """Base of models that train a network of the user's: it is the one to be looked at.

    Attributes:
        net: The network.
    """

    net: keras.Model


def network_of(model: Any) -> Any:
    """The network that a model holds as `net`; any other Keras model itself.

    An attribute of that name in a model of the user's own is a part of it, and no more.

    Args:
        model: A Keras model, or an object with an attribute `net`.
    """
    if isinstance(model, keras.Model) and not isinstance(model, HoldsNetwork):
        return model
    return getattr(model, "net", model)
