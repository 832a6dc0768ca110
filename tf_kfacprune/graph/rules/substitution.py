"""Calling a Keras layer with some of its attributes replaced for the time of the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["substituted"]


@contextmanager
def substituted(layer: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes of a layer, weights and methods included, within a `with` block.

    Works past Keras' attribute tracking, which is locked once a layer is built and would take a
    tensor in place of a weight for a loss of the weight.

    Args:
        layer: The layer.
        **attributes: The attributes and what to put in their place.
    """
    own = vars(layer)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)
