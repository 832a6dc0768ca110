"""One batch: inputs, labels and weights that belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

__all__ = ["Batch", "mask_of"]


@dataclass(frozen=True)
class Batch:
    """A batch as a training step gets it.

    Attributes:
        x: Inputs in the structure of the model's inputs; the first axis is the batch.
        y: Labels, in the structure that `fit` was given, or None.
        weights: Weights of the examples or of their entries, likewise, or None.
    """

    x: Any
    y: Any = None
    weights: Any = None

    @classmethod
    def of(cls, data: Any) -> Batch:
        """The batch that Keras hands to `train_step`."""
        return cls(*keras.utils.unpack_x_y_sample_weight(data))

    @property
    def size(self) -> Any:
        """Number of examples, a scalar int32 tensor."""
        return tf.shape(keras.tree.flatten(self.x)[0])[0]

    def head(self, fraction: float, at_least: int = 1) -> Batch:
        """The first `ceil(fraction * size)` examples: of inputs, labels and weights alike.

        Args:
            fraction: Share of the batch, in (0, 1].
            at_least: Take so many examples, as far as the batch has them.
        """
        if fraction == 1.0:
            return self
        count = tf.math.ceil(fraction * tf.cast(self.size, "float32"))
        count = tf.maximum(tf.cast(count, "int32"), at_least)

        def first(tensor: Any) -> Any:
            return None if tensor is None else tensor[:count]

        parts = (self.x, self.y, self.weights)
        return Batch(*(keras.tree.map_structure(first, part) for part in parts))


def mask_of(tensors: Any) -> Any:
    """The masks that Keras keeps with the tensors of a structure, None for those without one."""
    return keras.tree.map_structure(lambda t: getattr(t, "_keras_mask", None), tensors)
