"""Which layers the caller allows to be pruned: `include` and `exclude`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import keras

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph import reasons
from tf_kfacprune.graph.tracer import Graph

__all__ = ["Selection", "Selector"]

# One entry of `include` or `exclude`.
Selector: TypeAlias = str | re.Pattern[str] | keras.Layer


class Selection:
    """The caller's choice among the layers (and inputs) that create channels.

    A text or pattern is matched against a layer's whole name, its path, and the paths of the
    nested models it lies in.

    Args:
        graph: The traced model.
        include: If given, only these layers may lose neurons.
        exclude: These layers keep all their neurons, also if included.

    Raises:
        InvalidArgumentError: If an entry matches nothing in the model, or is no regular expression.
    """

    def __init__(
        self,
        graph: Graph,
        include: Sequence[Selector] | Selector | None = None,
        exclude: Sequence[Selector] | Selector = (),
    ) -> None:
        self._include = None
        if include is not None:
            self._include = _without_opened(_entries("include", include), graph)
        self._exclude = _without_opened(_entries("exclude", exclude), graph)
        paths = [*(call.path for call in graph.calls), *graph.input_names]
        names = {name for path in paths for name in _names(path)}
        operations = {id(call.operation) for call in graph.calls}
        for argument, entries in (("include", self._include or []), ("exclude", self._exclude)):
            for entry in entries:
                if not _is_known(entry, names, operations):
                    raise InvalidArgumentError(
                        f"Argument `{argument}` names no layer of model {graph.model.name!r}: "
                        f"{entry!r}. Expected layer names, regular expressions for whole names, "
                        "or layers of the model."
                    )

    def why_left_out(self, name: str, layer: Any) -> str | None:
        """Why a layer (or input: None) keeps its neurons by the caller's choice, or None."""
        if _matches(self._exclude, name, layer):
            return reasons.EXCLUDED
        if self._include is not None and not _matches(self._include, name, layer):
            return reasons.NOT_INCLUDED
        return None


def _entries(argument: str, given: Sequence[Selector] | Selector) -> list[Selector]:
    single = isinstance(given, (str, re.Pattern, keras.Layer))
    entries: list[Selector] = [given] if single else list(given)  # type: ignore[arg-type]
    for entry in entries:
        try:
            re.compile(entry if isinstance(entry, str) else "")
        except re.error as error:
            raise InvalidArgumentError(
                f"Argument `{argument}`: {entry!r} is neither the name of a layer nor a regular "
                f"expression: {error}. Write special characters of a name with a backslash."
            ) from error
    return entries


def _without_opened(entries: list[Selector], graph: Graph) -> list[Selector]:
    """Opened layers among the entries, by their paths: they stand for all that is inside."""
    found: list[Selector] = []
    for entry in entries:
        paths = [path for path, layer in graph.opened.items() if layer is entry]
        found += map(re.escape, paths) if paths else [entry]
    return found


def _names(path: str) -> Iterator[str]:
    """The last name of a path, the path, and the paths of the models around it."""
    parts = path.split("/")
    yield parts[-1]
    yield from ("/".join(parts[:k]) for k in range(1, len(parts) + 1))


def _is_known(entry: Selector, names: set[str], operations: set[int]) -> bool:
    if isinstance(entry, (str, re.Pattern)):
        return any(re.fullmatch(entry, name) for name in names)
    return id(entry) in operations


def _matches(entries: Sequence[Selector], path: str, layer: Any) -> bool:
    return any(
        any(re.fullmatch(entry, name) for name in _names(path))
        if isinstance(entry, (str, re.Pattern))
        else layer in (entry, getattr(entry, "layer", entry))
        for entry in entries
    )
