"""One wording for wrong arguments: whose, which, what was expected, what was received."""

from __future__ import annotations

from typing import Any

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["require"]


def require(owner: str, ok: bool, name: str, expected: str, received: Any) -> None:
    """Refuses an argument unless it is fine.

    Args:
        owner: Name of the class or function the argument belongs to.
        ok: Whether the argument is fine.
        name: Name of the argument.
        expected: What it must be, as it reads after "must be".
        received: Its value.

    Raises:
        InvalidArgumentError: If `ok` is false.
    """
    if not ok:
        raise InvalidArgumentError(
            f"Argument `{name}` of {owner} must be {expected}. Received: {name}={received!r}"
        )
