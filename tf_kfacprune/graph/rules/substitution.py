"""Calling a Keras layer with some attributes, its own or a module's, replaced for the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["substituted"]


@contextmanager
def substituted(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes of a layer or module, weights and methods included, in a `with` block.

    Works past Keras' attribute tracking, which is locked once a layer is built and would take a
    tensor in place of a weight for a loss of the weight.

    Args:
        owner: The layer or module.
        **attributes: The attributes and what to put in their place.
    """
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)
