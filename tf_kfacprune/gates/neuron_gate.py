"""Gate layers: `NeuronGate` for models built by hand, `GateBank` and `GateEdge` for inserted gates.

A gate belongs on the data input of a contraction (Dense or convolution kernel). There, a value of
0 makes the channel vanish from the network exactly, whatever activation, normalization or bias
came before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates.gate_source import GateSource
from tf_kfacprune.graph.rules.base import along

__all__ = ["FeatureEdge", "GateBank", "GateEdge", "NeuronGate"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class NeuronGate(GateSource):
    """Multiplies each channel of its input by a trainable gate in [0, 1].

    Put it directly in front of a Dense or convolution layer; `tf_kfacprune.layers.GatedDense` and
    its siblings do that for you. While a `PrunableModel` holds gates open, the layer is the
    identity to the bit.

    Args:
        kind: `"hard_concrete"` (stochastic in training) or `"deterministic"`.
        axis: The channel axis, as in BatchNormalization; not the batch axis.
        seed: Seed of the gate noise.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        InvalidArgumentError: If `kind` is unknown, or the channel axis is the batch axis, out of
            range or of unknown size.

    Examples:
        >>> import keras, tf_kfacprune as kp
        >>> inputs = keras.Input((16,))
        >>> hidden = keras.layers.Dense(8, activation="relu")(inputs)
        >>> outputs = keras.layers.Dense(2)(kp.layers.NeuronGate()(hidden))

    References:
        Louizos, Welling, Kingma 2018 (hard concrete gates).
    """

    def __init__(
        self,
        kind: str = "hard_concrete",
        axis: int = -1,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(kind=kind, seed=seed, **kwargs)
        self.axis = axis

    def build(self, input_shape: Sequence[int | None]) -> None:
        rank = len(input_shape)
        axis = self.axis + rank if self.axis < 0 else self.axis
        if not 0 < axis < rank or input_shape[axis] is None:
            raise InvalidArgumentError(
                f"NeuronGate {self.name!r} needs a channel axis of known size that is not the "
                f"batch axis. Received: axis={self.axis}, input shape {tuple(input_shape)}"
            )
        self._num_channels = int(input_shape[axis])  # type: ignore[arg-type]
        self.add_gate_weights()
        self.built = True

    @property
    def group_sizes(self) -> Sequence[int]:
        return (self._num_channels,)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return inputs * along(self.values(training), self.axis, inputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GateBank(GateSource):
    """All gates of a model as one vector, drawn once per forward pass.

    Coupled channels (residual streams, concatenations, flattened maps) read the same gate at
    several places, so the values are computed once and handed to the `GateEdge` and `GateAware`
    layers.

    Args:
        groups: `(name, size)` of each group of neurons; gates are numbered in this order.
        kind: `"hard_concrete"` or `"deterministic"`.
        seed: Seed of the gate noise.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, int]],
        kind: str = "hard_concrete",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(kind=kind, seed=seed, **kwargs)
        self.groups = tuple((str(name), int(size)) for name, size in groups)

    def build(self, input_shape: Any) -> None:
        del input_shape
        self.add_gate_weights()
        self.built = True

    @property
    def group_sizes(self) -> Sequence[int]:
        return tuple(size for _, size in self.groups)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns the gates and which neurons are present; `inputs` only places the layer.

        Both have shape `(n,)`. Present (1, not 0) are the neurons that compaction leaves: those
        with an open gate and, where a whole group is closed, the one most likely to be open.
        """
        del inputs
        z = self.values(training)
        return z, self._presence(z)

    def _presence(self, z: Any) -> Any:
        group = np.repeat(np.arange(len(self.groups)), self.group_sizes).astype("int32")
        number = np.arange(self.size, dtype="float32")

        def most(values: Any) -> Any:
            return ops.take(ops.segment_max(values, group, len(self.groups)), group)

        probability = self.open_probability()
        likeliest = ops.where(probability == most(probability), -number, -float(self.size))
        stays = ops.logical_and(most(z) <= 0, likeliest == most(likeliest))
        return ops.cast(ops.logical_or(z > 0, stays), "float32")

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None
    ) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        del inputs, training
        return tuple(keras.KerasTensor((self.size,), dtype="float32") for _ in range(2))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """The gate vectors have no batch axis, hence no mask."""
        del inputs, previous_mask

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "groups": [list(group) for group in self.groups]}


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GateEdge(keras.layers.Layer):
    """Applies gates of a `GateBank` on one edge: `x * z[indices]` along the channel axis.

    Args:
        indices: For each channel the number of its gate, or the number of gates in the bank for a
            channel that is never pruned.
        axis: The channel axis of `x`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, indices: Sequence[int], axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.indices = np.asarray(indices, "int32")
        self.axis = axis
        self.supports_masking = True

    def call(self, inputs: Sequence[Any]) -> Any:
        """Gates `inputs = [x, z]`; returns a tensor of the shape of `x`."""
        x, z = inputs
        always_open = ops.ones((1,), dtype=z.dtype)
        z = ops.take(ops.concatenate([z, always_open]), self.indices)
        return x * along(z, self.axis, x)

    def compute_output_spec(self, inputs: Sequence[Any]) -> keras.KerasTensor:
        return keras.KerasTensor(inputs[0].shape, dtype=self.compute_dtype)

    def compute_mask(self, inputs: Sequence[Any], previous_mask: Any = None) -> Any:
        """The mask of `x` passes through."""
        return previous_mask[0] if isinstance(previous_mask, (list, tuple)) else previous_mask

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "indices": self.indices.tolist(), "axis": self.axis}


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class FeatureEdge(GateEdge):
    """A `GateEdge` for entries of flattened channels, each of which is a neuron of its own.

    It stands behind the `GateEdge` of the channels, so that a feature is there if both of its gates
    are open.
    """
