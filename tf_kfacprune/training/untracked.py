"""A box that Keras does not look into."""

from __future__ import annotations

from typing import Any

__all__ = ["Untracked"]


class Untracked:
    """Holds what refers to layers that are tracked already: Keras would track them twice.

    Attributes:
        content: What is held.
    """

    def __init__(self, content: Any) -> None:
        self.content = content
