"""One wording for wrong arguments: whose, which, what was expected, what was received."""

from __future__ import annotations

from typing import Any

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["require", "require_count"]


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


def require_count(owner: str, name: str, value: Any, *, optional: bool = False) -> None:
    """Refuses an argument unless it is an integer >= 1.

    Args:
        owner: Name of the class or function the argument belongs to.
        name: Name of the argument.
        value: Its value.
        optional: Whether None is fine, too.

    Raises:
        InvalidArgumentError: If it is something else; True and False are no numbers.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    ok = is_count or (optional and value is None)
    require(owner, ok, name, "an integer >= 1" + " or None" * optional, value)
