"""What every layer that owns gates has in common: parameters, phases and values.

A gate goes through three phases within one training run:

* `HELD_OPEN` (warm-up): every gate is exactly 1, nothing is learned about it.
* `PRUNING`: the value follows the trainable parameters; stochastic gates are sampled in training.
* `SETTLED`: what is closed stays closed, what is open keeps its deterministic value, a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates.hard_concrete import HardConcrete
from tf_kfacprune.gates.proximal import Proximal

__all__ = ["GATE_KINDS", "GatePhase", "GateSource"]

GATE_KINDS: dict[str, type[HardConcrete] | type[Proximal]] = {
    "hard_concrete": HardConcrete,
    "deterministic": Proximal,
}


class GatePhase(IntEnum):
    """How gates behave: held open, being pruned, or settled."""

    HELD_OPEN = 0
    PRUNING = 1
    SETTLED = 2


class GateSource(keras.layers.Layer):
    """Base of the layers that own gates.

    Attributes:
        size: Number of gates, n.
        group_sizes: Sizes of the groups that the n gates consist of, in order.
        parameters: Trainable parameters of the gates, shape `(n,)`.
        keep: Non-trainable, shape `(n,)`: 1 where a gate may be open, 0 where it is closed for
            good.
        phase: Non-trainable scalar, a `GatePhase`.

    Args:
        kind: `"hard_concrete"` (stochastic, Louizos et al. 2018) or `"deterministic"`.
        seed: Seed of the gate noise, or None for a random one.
        **kwargs: Arguments of `keras.layers.Layer`. Gates always compute in float32.

    Raises:
        InvalidArgumentError: If `kind` is unknown.
    """

    def __init__(self, kind: str = "hard_concrete", seed: int | None = None, **kwargs: Any) -> None:
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        if kind not in GATE_KINDS:
            raise InvalidArgumentError(
                f"Argument `kind` of {type(self).__name__} {self.name!r} must be one of "
                f"{sorted(GATE_KINDS)}. Received: kind={kind!r}"
            )
        self.kind = kind
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    @property
    def distribution(self) -> type[HardConcrete] | type[Proximal]:
        """The functions that turn parameters into gate values."""
        return GATE_KINDS[self.kind]

    @property
    def size(self) -> int:
        """Number of gates."""
        return sum(self.group_sizes)

    @property
    def group_sizes(self) -> Sequence[int]:
        """Sizes of the groups of neurons, in the order of the gates."""
        raise NotImplementedError

    def add_gate_weights(self) -> None:
        """Creates `parameters`, `keep` and `phase`; called by `build` once the size is known."""
        self.parameters = self.add_weight(
            shape=(self.size,),
            initializer=keras.initializers.Constant(self.distribution.initial_parameter),
            constraint=self.distribution.constraint,
            name="parameters",
        )
        self.keep = self.add_weight(
            shape=(self.size,), initializer="ones", trainable=False, name="keep"
        )
        self.phase = self.add_weight(
            shape=(), initializer="zeros", dtype="int32", trainable=False, name="phase"
        )

    def values(self, training: bool | None) -> Any:
        """Gate values of one forward pass, shape `(n,)`; noise is drawn once per call."""
        parameters, keep = ops.convert_to_tensor(self.parameters), ops.convert_to_tensor(self.keep)
        deterministic = self.distribution.deterministic(parameters)
        pruning = deterministic
        if training and self.distribution.stochastic:
            noise = keras.random.uniform((self.size,), seed=self.seed_generator)
            pruning = self.distribution.sample(parameters, noise)
        return self._by_phase(ops.ones_like(keep), pruning, ops.stop_gradient(deterministic), keep)

    def deterministic_values(self) -> Any:
        """Inference-mode gate values, shape `(n,)`: 0 exactly if closed, 1 exactly if wide open."""
        return self.values(training=False)

    def open_probability(self) -> Any:
        """Differentiable probability that each gate is open, shape `(n,)`, for expected costs."""
        parameters, keep = ops.convert_to_tensor(self.parameters), ops.convert_to_tensor(self.keep)
        is_open = ops.cast(self.distribution.deterministic(parameters) > 0, keep.dtype)
        probability = self.distribution.open_probability(parameters)
        return self._by_phase(ops.ones_like(keep), probability, is_open, keep)

    def _by_phase(self, held_open: Any, pruning: Any, settled: Any, keep: Any) -> Any:
        phase = ops.convert_to_tensor(self.phase)
        by_parameters = keep * ops.where(phase == int(GatePhase.PRUNING), pruning, settled)
        return ops.where(phase == int(GatePhase.HELD_OPEN), held_open, by_parameters)

    def settle(self, keep: Any) -> None:
        """Enters `SETTLED`: closes every gate outside `keep` for good.

        A gate that is kept although its own logit had closed it is opened (a stochastic one half),
        so that the settled network has exactly the neurons in `keep`.

        Args:
            keep: Array or tensor of shape `(n,)`, 1 to keep, 0 to close.
        """
        parameters = ops.convert_to_tensor(self.parameters)
        closed = self.distribution.deterministic(parameters) <= 0
        reopened_as = self.distribution.parameter_of_value(self.distribution.reopened_value)
        keep = ops.cast(keep, self.keep.dtype)
        reopened = ops.logical_and(closed, keep > 0)
        self.parameters.assign(ops.where(reopened, reopened_as, parameters))
        self.keep.assign(keep)
        self.phase.assign(int(GatePhase.SETTLED))

    def set_values(self, values: Any) -> None:
        """Sets the inference-mode values by hand and enters `SETTLED`; for tests and tools.

        Args:
            values: Array of shape `(n,)` in [0, 1].

        Raises:
            InvalidArgumentError: If the shape or the range is wrong.
        """
        values = np.asarray(values, "float32")
        if values.shape != (self.size,) or not np.all((values >= 0) & (values <= 1)):
            raise InvalidArgumentError(
                f"Gate values of {self.name!r} must lie in [0, 1] and have shape ({self.size},). "
                f"Received: shape {values.shape}, range [{values.min()}, {values.max()}]"
            )
        inner = np.clip(values, 1e-6, 1 - 1e-6)
        parameters = np.array(
            [self.distribution.parameter_of_value(float(v)) for v in inner], "float32"
        )
        wide_open = (
            self.distribution.initial_parameter + 10.0 if self.distribution.stochastic else 1.0
        )
        self.parameters.assign(np.where(values == 1.0, wide_open, parameters))
        self.keep.assign(values > 0)
        self.phase.assign(int(GatePhase.SETTLED))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("dtype", None)
        return {**config, "kind": self.kind, "seed": self.seed}
