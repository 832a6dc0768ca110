"""The two things a traced graph is made of: values and the calls that compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import tree

__all__ = ["GATES", "Call", "Value"]

# The keyword under which a gate-aware layer receives the gates of what it reads inside.
GATES = "gates"


@dataclass(eq=False, frozen=True)
class Value:
    """One tensor of a traced graph.

    Attributes:
        shape: Static shape, None where unknown.
        dtype: Name of the element type.
    """

    shape: tuple[int | None, ...]
    dtype: str

    def symbolic(self) -> Any:
        """A free-standing symbolic tensor of this shape and type."""
        return keras.KerasTensor(self.shape, dtype=self.dtype)


@dataclass(eq=False)
class Call:
    """One call of a layer or operation.

    Attributes:
        operation: The layer or operation. A shared layer is the same object in all its calls.
        args: Positional arguments, with a `Value` wherever a tensor stood.
        kwargs: Keyword arguments, likewise.
        outputs: The results, flattened.
        path: Name of the operation, preceded by the names of the nested models it lies in.
        runner: What executes the call, if not the operation itself: the gate-aware layer around
            it, which has one argument more, `gates`.
        inputs: The data the call reads: all `Value`s of the arguments except masks and gates.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    path: str
    runner: Any = None
    inputs: tuple[Value, ...] = field(init=False)

    def __post_init__(self) -> None:
        data = {key: value for key, value in self.kwargs.items() if self._is_data(key)}
        self.inputs = tuple(v for v in tree.flatten((self.args, data)) if isinstance(v, Value))

    def execute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Executes the call with filled-in arguments."""
        return (self.runner or self.operation)(*args, **kwargs)

    def without_gates(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the operation itself, without those of its runner."""
        return {k: v for k, v in kwargs.items() if self.runner is None or k != GATES}

    def _is_data(self, keyword: str) -> bool:
        is_mask = keyword == "mask" or keyword.endswith("_mask")
        return not is_mask and (self.runner is None or keyword != GATES)

    def map_data(
        self, function: Callable[[Any, Any], Any], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Replaces data among filled-in arguments; masks, gates and added keywords stay.

        Args:
            function: Receives every leaf of the recorded arguments (a `Value` or a setting) and
                what was filled in for it, and returns what to use instead.
            args: Filled-in positional arguments.
            kwargs: Filled-in keyword arguments.

        Returns:
            The new positional and keyword arguments.
        """
        data = {key for key in self.kwargs if key in kwargs and self._is_data(key)}
        mapped = {
            key: tree.map_structure(function, self.kwargs[key], given) if key in data else given
            for key, given in kwargs.items()
        }
        return tree.map_structure(function, self.args, args), mapped

    @property
    def is_layer(self) -> bool:
        """Whether the operation is a Keras layer (else a stateless operation)."""
        return isinstance(self.operation, keras.Layer)
