"""What a forward pass changes, so that it can be undone or repeated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

__all__ = ["ForwardState", "kept_state"]


class ForwardState:
    """Remembers the state of a network when it is created.

    That is normalization statistics, seeds, and the states of stateful recurrent layers.

    Restoring it before another pass on the same batch repeats the same dropout masks and gate
    noise: the loss before and after a step are then values of one and the same function.

    Args:
        network: The network.
        ignore: Variables that a step changes on purpose.
    """

    def __init__(self, network: Any, ignore: Iterable[Any] = ()) -> None:
        ignored = {id(variable) for variable in ignore}
        variables = [*network.non_trainable_variables, *_recurrent_states(network)]
        self._variables = [v for v in variables if id(v) not in ignored]
        self._values = [tf.convert_to_tensor(variable) for variable in self._variables]

    def restore(self) -> None:
        """Brings the remembered values back."""
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)

    def restore_statistics(self) -> None:
        """Brings back all but seeds: noise goes on as if the pass had counted."""
        for variable, value in zip(self._variables, self._values, strict=True):
            if value.dtype.is_floating:
                variable.assign(value)


@contextmanager
def kept_state(network: Any) -> Iterator[None]:
    """Within this context passes may change the state of a network; then it is as before."""
    state = ForwardState(network)
    try:
        yield
    finally:
        state.restore()


def _recurrent_states(network: Any) -> list[Any]:
    """What stateful recurrent layers keep from batch to batch; Keras has them in no list."""
    states = [
        layer.states for layer in network._flatten_layers() if getattr(layer, "stateful", False)
    ]
    return [state for state in keras.tree.flatten(states) if isinstance(state, keras.Variable)]
