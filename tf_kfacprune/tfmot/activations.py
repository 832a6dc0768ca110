"""Activations of Keras 3 in tf_keras: under their own name, another one, or composed of layers."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["FUSED", "composed", "legacy_name"]

# What a layer keeps as its own activation: tensorflow-model-optimization quantizes these there.
FUSED = {"linear", "relu", "softmax", "sigmoid", "tanh", "swish", "gelu"}
_SAME = {"elu", "selu", "softplus", "softsign", "exponential"}
_OTHER_NAMES = {"silu": "swish"}
_COMPOSED = {"relu6", "hard_sigmoid", "hard_silu", "leaky_relu"}


def legacy_name(activation: Any) -> str | None:
    """Name to translate an activation function of Keras 3 by; None if there is none."""
    name = getattr(activation, "__name__", None)
    if name is None or getattr(keras.activations, name, None) is not activation:
        return None
    name = _OTHER_NAMES.get(name, name)
    return name if name in FUSED | _SAME | _COMPOSED else None


def composed(activation: str, x: Any, name: str, legacy: Any) -> Any:
    """Applies an activation as layers of its own.

    Args:
        activation: a name that `legacy_name` returned.
        x: a tf_keras tensor.
        name: name of the layer, or beginning of the names of the layers.
        legacy: the package ``tf_keras``.

    Returns:
        The activated tensor.
    """
    layers = legacy.layers
    if activation == "relu6":
        return layers.ReLU(max_value=6.0, name=name)(x)
    if activation == "leaky_relu":
        return layers.LeakyReLU(alpha=0.2, name=name)(x)
    if activation in ("hard_sigmoid", "hard_silu"):
        # Keras 3: relu6(x + 3) / 6. The function of that name in tf_keras is another one.
        shifted = layers.Rescaling(1.0, 3.0, name=f"{name}_shift")(x)
        clipped = layers.ReLU(max_value=6.0, name=f"{name}_clip")(shifted)
        is_gate = activation == "hard_sigmoid"
        gate = layers.Rescaling(1.0 / 6.0, name=name if is_gate else f"{name}_gate")(clipped)
        return gate if is_gate else layers.Multiply(name=name)([x, gate])
    return layers.Activation(activation, name=name)(x)
