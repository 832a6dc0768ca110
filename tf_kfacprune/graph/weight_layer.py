"""A weight of an opened layer as a node of the graph.

A layer that is opened may compute with weights of its own beside those of the layers inside it. In
the flat network each of them needs an owner, which Keras trains, saves and loads: a `Weight` layer,
which takes over the variable itself and puts out its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

__all__ = ["Weight"]


@keras.saving.register_keras_serializable(package="tf_kfacprune")
class Weight(keras.layers.Layer):
    """Puts out its weight, whatever it is called with; the input only places it in a graph.

    Attributes:
        weight: The variable.

    Args:
        shape: Shape of the weight.
        weight_autocast: Whether the weight is converted to the compute type of the layer.
        weight_dtype: Element type of the weight, by default that of the layer's variables.
        regularizer: Of the weight.
        constraint: Of the weight.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        weight_autocast: bool = True,
        weight_dtype: str | None = None,
        regularizer: Any = None,
        constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weight_shape = tuple(shape)
        self.weight_autocast = weight_autocast
        self.weight_dtype = weight_dtype or self.variable_dtype
        self.regularizer = keras.regularizers.get(regularizer)
        self.constraint = keras.constraints.get(constraint)
        self.supports_masking = True

    @classmethod
    def around(cls, variable: keras.Variable, name: str, policy: Any) -> Weight:
        """The layer that owns a variable which exists already.

        Args:
            variable: The variable. It is taken over, not copied.
            name: Name of the layer.
            policy: Dtype policy of the layer that the variable belongs to.

        Returns:
            A built layer.
        """
        layer = cls(
            tuple(variable.shape),
            weight_autocast=getattr(variable, "_autocast", True),
            weight_dtype=variable.dtype,
            regularizer=variable.regularizer,
            constraint=variable.constraint,
            name=name,
            dtype=policy,
            trainable=variable.trainable,
        )
        layer.weight = variable
        layer.built = True
        return layer

    def build(self, input_shape: Any) -> None:
        del input_shape
        self.weight = self.add_weight(
            shape=self.weight_shape,
            initializer="zeros",
            dtype=self.weight_dtype,
            autocast=self.weight_autocast,
            regularizer=self.regularizer,
            constraint=self.constraint,
            name="weight",
        )
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Returns the weight, converted to the compute type."""
        del inputs
        # `value` is converted to the compute type; `reshape` makes a tensor of a variable.
        return ops.reshape(self.weight.value, self.weight_shape)

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        del inputs
        casts = self.weight_autocast and "float" in self.weight_dtype
        dtype = self.compute_dtype if casts else self.weight_dtype
        return keras.KerasTensor(self.weight_shape, dtype=dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """A weight has no batch axis, hence no mask."""
        del inputs, previous_mask

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "shape": list(self.weight_shape),
            "weight_autocast": self.weight_autocast,
            "weight_dtype": self.weight_dtype,
            "regularizer": keras.regularizers.serialize(self.regularizer),
            "constraint": keras.constraints.serialize(self.constraint),
        }
