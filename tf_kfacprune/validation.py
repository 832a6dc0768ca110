"""One wording for wrong arguments: whose, which, what was expected, what was received."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from tf_kfacprune.errors import InvalidArgumentError

__all__ = ["is_count", "is_number_in", "require", "require_count", "require_number"]


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
    ok = is_count(value) or (optional and value is None)
    require(owner, ok, name, "an integer >= 1" + " or None" * optional, value)


def require_number(
    owner: str, name: str, value: Any, interval: str, *, optional: bool = False
) -> None:
    """Refuses an argument unless it is a number in an interval.

    Args:
        owner: Name of the class or function the argument belongs to.
        name: Name of the argument.
        value: Its value.
        interval: As it is written: `"(0, 1]"`, `"[0, inf)"`.
        optional: Whether None is fine, too.

    Raises:
        InvalidArgumentError: If it is something else; True and False are no numbers, nor is NaN.
    """
    ok = is_number_in(value, interval) or (optional and value is None)
    require(owner, ok, name, f"a number in {interval}" + " or None" * optional, value)


def is_count(value: Any) -> bool:
    """Whether a value is an integer >= 1, of Python or NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number_in(value: Any, interval: str) -> bool:
    """Whether a value is a number, of Python or NumPy, in an interval such as `"(0, 1]"`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number = float(value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= number if interval[0] == "[" else low < number
    below = number <= high if interval[-1] == "]" else number < high
    return above and below
