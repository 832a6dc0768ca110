"""Contraction layers with a gate on their data input, for models built by hand.

Each is a composition `layer(gate(x))`: the ordinary Keras layer stays an ordinary Keras layer, and
the gate is a sublayer (an extra *weight* on a subclass of Dense would break loading).
"""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates.neuron_gate import NeuronGate

__all__ = [
    "GatedConv1D",
    "GatedConv1DTranspose",
    "GatedConv2D",
    "GatedConv2DTranspose",
    "GatedConv3D",
    "GatedConv3DTranspose",
    "GatedDense",
    "GatedSeparableConv1D",
    "GatedSeparableConv2D",
]

_BASE_KEYS = ("name", "trainable", "dtype")


class _GatedLayer(keras.layers.Layer):
    """A gate followed by the layer that reads the gated neurons.

    Args:
        *args: Positional arguments of the Keras layer.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of the Keras layer.

    Raises:
        InvalidArgumentError: If `gate` is neither.
    """

    layer_class: ClassVar[type[keras.layers.Layer]]

    def __init__(self, *args: Any, gate: str | NeuronGate = "hard_concrete", **kwargs: Any) -> None:
        base = {key: kwargs.pop(key) for key in _BASE_KEYS if key in kwargs}
        super().__init__(**base)
        if not isinstance(gate, (str, NeuronGate)):
            raise InvalidArgumentError(
                f"Argument `gate` of {type(self).__name__} {self.name!r} must be a kind of gate or "
                f"a NeuronGate. Received: gate={gate!r}"
            )
        self.layer = self.layer_class(
            *args, name=self.name, trainable=self.trainable, dtype=self.dtype_policy, **kwargs
        )
        if isinstance(gate, str):
            channels_first = getattr(self.layer, "data_format", None) == "channels_first"
            gate = NeuronGate(kind=gate, axis=1 if channels_first else -1, name=f"{self.name}_gate")
        self.gate = gate
        self.supports_masking = True

    @property
    def lowered_layers(self) -> tuple[keras.layers.Layer, ...]:
        """The layers whose calls in sequence are this layer's call; read by the tracer."""
        return (self.gate, self.layer)

    def build(self, input_shape: Any) -> None:
        for layer in self.lowered_layers:
            if not layer.built:  # a loaded or shared gate is
                layer.build(input_shape)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.layer(self.gate(inputs, training=training))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        layer = {k: v for k, v in self.layer.get_config().items() if k not in _BASE_KEYS}
        gate = keras.saving.serialize_keras_object(self.gate)
        return {**super().get_config(), **layer, "gate": gate}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _GatedLayer:
        gate = keras.saving.deserialize_keras_object(config["gate"])
        return cls(**{**config, "gate": gate})


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedDense(_GatedLayer):
    """`keras.layers.Dense` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.Dense`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.Dense`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedDense(10)
    """

    layer_class = keras.layers.Dense


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedConv1D(_GatedLayer):
    """`keras.layers.Conv1D` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.Conv1D`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.Conv1D`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedConv1D(8, 3)
    """

    layer_class = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedConv2D(_GatedLayer):
    """`keras.layers.Conv2D` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.Conv2D`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.Conv2D`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedConv2D(8, 3)
    """

    layer_class = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedConv3D(_GatedLayer):
    """`keras.layers.Conv3D` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.Conv3D`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.Conv3D`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedConv3D(8, 3)
    """

    layer_class = keras.layers.Conv3D


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedConv1DTranspose(_GatedLayer):
    """`keras.layers.Conv1DTranspose` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.Conv1DTranspose`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.Conv1DTranspose`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedConv1DTranspose(8, 3)
    """

    layer_class = keras.layers.Conv1DTranspose


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedConv2DTranspose(_GatedLayer):
    """`keras.layers.Conv2DTranspose` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.Conv2DTranspose`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.Conv2DTranspose`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedConv2DTranspose(8, 3)
    """

    layer_class = keras.layers.Conv2DTranspose


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedConv3DTranspose(_GatedLayer):
    """`keras.layers.Conv3DTranspose` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.Conv3DTranspose`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.Conv3DTranspose`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedConv3DTranspose(8, 3)
    """

    layer_class = keras.layers.Conv3DTranspose


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedSeparableConv1D(_GatedLayer):
    """`keras.layers.SeparableConv1D` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.SeparableConv1D`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.SeparableConv1D`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedSeparableConv1D(8, 3)
    """

    layer_class = keras.layers.SeparableConv1D


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class GatedSeparableConv2D(_GatedLayer):
    """`keras.layers.SeparableConv2D` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.SeparableConv2D`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.SeparableConv2D`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Example:
        >>> layer = kp.layers.GatedSeparableConv2D(8, 3)
    """

    layer_class = keras.layers.SeparableConv2D
