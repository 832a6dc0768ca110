"""What only newer versions of Keras have."""

from __future__ import annotations

import inspect

import keras
import pytest

__all__ = ["IS_OLD", "needs_argument"]

# Keras 3.12, the oldest that is supported: differs in details that some tests are about.
IS_OLD = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 13)


def needs_argument(layer: type[keras.Layer], argument: str) -> pytest.MarkDecorator:
    """Skips a test where a layer does not know an argument yet."""
    return pytest.mark.skipif(
        argument not in inspect.signature(layer).parameters,
        reason=f"{layer.__name__} of Keras {keras.__version__} has no argument {argument!r}",
    )
