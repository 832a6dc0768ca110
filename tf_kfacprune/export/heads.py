"""What belongs around the network on the device: input scaling before it, a decision after it."""

from __future__ import annotations

import math

import keras
import numpy as np

from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.export.serving import check_exportable
from tf_kfacprune.export.text import TEXT

__all__ = ["HEADS", "with_head"]

HEADS = (None, "softmax", "argmax")


def with_head(
    model: keras.Model,
    head: str | None = None,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
) -> keras.Model:
    """Puts input scaling and a decision into the model, so that the device needs neither.

    The result computes ``head(model(scale * x + offset))`` and shares the model's weights; export
    it like any other model.

    Args:
        model: a built Sequential or Functional model with one input and one output.
        head: None, ``"softmax"`` (logits to probabilities) or ``"argmax"`` (the class number,
            int32, over the last axis).
        scale: factor of the raw input, for example ``1 / 255`` for bytes.
        offset: added after scaling.

    Returns:
        A Functional model with the input name of ``model``.

    Raises:
        UnsupportedModelError: if the model cannot be exported, or has several inputs or outputs.
        InvalidArgumentError: if ``head`` is unknown, or ``scale`` or ``offset`` is not usable.

    Examples:
        >>> import keras, tf_kfacprune as kp
        >>> net = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3)])
        >>> kp.export.with_head(net, "argmax", scale=1 / 255).output_shape
        (None,)
    """
    check_exportable(model)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UnsupportedModelError(
            f"Model {model.name!r} has {len(model.inputs)} inputs and {len(model.outputs)} "
            "outputs: a head goes on a model with one of each."
        )
    if head not in HEADS:
        raise InvalidArgumentError(f"head must be one of {HEADS}. Received: head={head!r}.")
    # What is finite and not 0 here may be something else in float32.
    if not (0 < abs(_in_float32(scale)) < math.inf and abs(_in_float32(offset)) < math.inf):
        raise InvalidArgumentError(
            "scale must be a finite number other than 0 and offset a finite number, both in "
            f"float32. Received: scale={scale!r}, offset={offset!r}."
        )
    (source,) = model.inputs
    if source.dtype == TEXT and (scale, offset) != (1.0, 0.0):
        raise InvalidArgumentError(
            f"Model {model.name!r} takes text, which cannot be scaled. Received: scale={scale!r}, "
            f"offset={offset!r}."
        )
    raw = keras.Input(batch_shape=source.shape, dtype=source.dtype, name=source.name)
    x = raw
    if (scale, offset) != (1.0, 0.0):
        x = keras.layers.Rescaling(scale, offset, name="input_scaling")(raw)
    y = model(x)
    if head == "softmax":
        y = keras.layers.Softmax(dtype="float32", name="softmax")(y)
    elif head == "argmax":
        # keras.ops.argmax compares bit patterns on this backend, which no TFLite operation does.
        y = keras.ops.squeeze(keras.ops.top_k(y, k=1)[1], axis=-1)
    return keras.Model(raw, y, name=model.name)


def _in_float32(number: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(number))
