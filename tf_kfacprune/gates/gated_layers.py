"""Contraction layers with a gate on their data input, for models built by hand.

Each is a composition `layer(gate(x))`: the ordinary Keras layer stays an ordinary Keras layer, and
the gate is a sublayer (an extra *weight* on a subclass of Dense would break loading).
"""

from __future__ import annotations

from typing import Any

import keras

from tf_kfacprune.gates.neuron_gate import NeuronGate
from tf_kfacprune.validation import require

__all__ = [
    "Gated",
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


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class Gated(keras.layers.Layer):
    """A gate, followed by the layer that reads the gated neurons.

    Args:
        layer: A layer that reads the channels of one tensor: Dense, a convolution, or one of your
            own with a channel rule. It is used, not copied.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Arguments of `keras.layers.Layer`; by default the name is that of the layer.

    Raises:
        InvalidArgumentError: If an argument is neither.

    Examples:
        >>> layer = kp.layers.Gated(keras.layers.Dense(10))
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        gate: str | NeuronGate = "hard_concrete",
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        require(owner, isinstance(layer, keras.layers.Layer), "layer", "a Keras layer", layer)
        is_gate = isinstance(gate, str | NeuronGate)
        require(owner, is_gate, "gate", "a kind of gate or a NeuronGate", gate)
        own = {"name": layer.name, "trainable": layer.trainable, "dtype": layer.dtype_policy}
        super().__init__(**{**own, **kwargs})
        self.layer = layer
        if isinstance(gate, str):
            channels_first = getattr(layer, "data_format", None) == "channels_first"
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
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "layer": serialize(self.layer),
            "gate": serialize(self.gate),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Gated:
        objects: dict[str, Any] = {
            key: keras.saving.deserialize_keras_object(config[key])
            for key in ("layer", "gate")
            if key in config
        }
        return cls(**{**config, **objects})


def _shorthand(layer_class: type[keras.layers.Layer], example: str) -> type[Gated]:
    """`Gated` around a new layer of a class, with the arguments of that class."""
    kind = layer_class.__name__

    class Shorthand(Gated):
        def __init__(
            self, *args: Any, gate: str | NeuronGate = "hard_concrete", **kwargs: Any
        ) -> None:
            super().__init__(layer_class(*args, **kwargs), gate)

        def get_config(self) -> dict[str, Any]:
            config = super().get_config()
            own = {key: config[key] for key in (*_BASE_KEYS, "gate")}
            return {**self.layer.get_config(), **own}

    Shorthand.__name__ = Shorthand.__qualname__ = f"Gated{kind}"
    Shorthand.__doc__ = f"""`keras.layers.{kind}` whose input neurons are gated.

    Args:
        *args: Positional arguments of `keras.layers.{kind}`.
        gate: A kind of gate (`"hard_concrete"` or `"deterministic"`) or a `NeuronGate`.
        **kwargs: Keyword arguments of `keras.layers.{kind}`.

    Raises:
        InvalidArgumentError: If `gate` is neither.

    Examples:
        >>> layer = kp.layers.Gated{kind}({example})
    """
    return keras.saving.register_keras_serializable(package="tf_kfacprune")(Shorthand)


GatedDense = _shorthand(keras.layers.Dense, "10")
GatedConv1D = _shorthand(keras.layers.Conv1D, "8, 3")
GatedConv2D = _shorthand(keras.layers.Conv2D, "8, 3")
GatedConv3D = _shorthand(keras.layers.Conv3D, "8, 3")
GatedConv1DTranspose = _shorthand(keras.layers.Conv1DTranspose, "8, 3")
GatedConv2DTranspose = _shorthand(keras.layers.Conv2DTranspose, "8, 3")
GatedConv3DTranspose = _shorthand(keras.layers.Conv3DTranspose, "8, 3")
GatedSeparableConv1D = _shorthand(keras.layers.SeparableConv1D, "8, 3")
GatedSeparableConv2D = _shorthand(keras.layers.SeparableConv2D, "8, 3")
