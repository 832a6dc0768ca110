"""Runs a network with second derivatives that are right where TensorFlow's are not.

Within `twice_differentiable(network)` the faulty layers are called by another expression of the
same function: normalizations with moments that are differentiated exactly, resizing as a linear
map whose gradient is one too, softsign as the quotient that it is. Everything else is the layers'
own. What cannot be mended so stays in the list of `second_derivatives`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature import exact_normalization as exact
from tf_kfacprune.curvature.linear_map import linear_map
from tf_kfacprune.curvature.second_derivatives import (
    check_executed_operations,
    check_second_derivatives,
    reachable_operations,
    runs_code_of_others,
    softsign_attributes,
)
from tf_kfacprune.graph.rules.substitution import substituted

__all__ = ["check_trained_twice_differentiably", "mends", "twice_differentiable"]

Call = Callable[..., Any]


def _resize(operation: Any, call: Call) -> Call:
    """`call` of anything that resizes images, or pads them with a constant."""
    affine = bool(getattr(operation, "pad_to_aspect_ratio", False) and operation.fill_value)

    def twice_differentiable_call(x: Any, **kwargs: Any) -> Any:
        if not tf.is_tensor(x) or not x.dtype.is_floating:
            return call(x, **kwargs)  # pixels as integers, or a dictionary: nothing to learn before
        return linear_map(lambda images: call(images, **kwargs), x, affine=affine)

    return twice_differentiable_call


def _frozen_state(layer: Any, call: Call) -> Call:
    """`call` of a layer that in training mode would write to its weights."""
    del layer
    return lambda x, training=None: call(x, training=False)


def _softsign(x: Any) -> Any:
    return x / (1 + tf.abs(x))


_OF_LAYERS: dict[type[keras.Layer], Callable[[Any, Call], Call]] = {
    keras.layers.BatchNormalization: exact.batch_normalization,
    keras.layers.CenterCrop: _resize,  # of images that are too small
    keras.layers.GroupNormalization: exact.group_normalization,
    keras.layers.LayerNormalization: exact.layer_normalization,
    keras.layers.Resizing: _resize,
    keras.layers.SpectralNormalization: _frozen_state,
    keras.layers.UpSampling2D: _resize,
}
_OF_OPERATIONS: dict[str, Callable[[Any, Call], Call]] = {
    "LayerNorm": exact.layer_normalization_operation,
    "Moments": exact.moments_operation,
    "Resize": _resize,
    "Softsign": lambda operation, call: _softsign,
}


@contextmanager
def twice_differentiable(network: keras.Operation) -> Iterator[None]:
    """Re-expresses layers with wrong second derivatives for the time of a `with` block.

    Within it the network computes what it computes outside, up to rounding, and its gradient can
    be differentiated again:

    - BatchNormalization in training mode, with statistics of the batch, in at least float32;
    - LayerNormalization, GroupNormalization, `keras.ops.moments`;
    - `UpSampling2D`, `Resizing`, `CenterCrop` and `keras.ops.image.resize` with any interpolation,
      to the bit;
    - softsign.

    The pass leaves no trace: BatchNormalization does not move its statistics, and
    SpectralNormalization takes its kernel as it is, where in training mode it would normalize and
    overwrite it.

    Wrappers that replace `call`, as `capture` does, go inside. With a `tf.distribute` strategy the
    block encloses `strategy.run`: replicas share the layers.

    Args:
        network: A model or layer; nested models, wrappers and attributes of layers are searched.

    Yields:
        Nothing.

    Raises:
        UnsupportedModelError: When the network is called in training mode and has a
            BatchNormalization with `renorm=True`.
    """
    with ExitStack() as stack:
        for operation in reachable_operations(network):
            replaced: dict[str, Any] = dict.fromkeys(softsign_attributes(operation), _softsign)
            reexpress = _reexpression(operation)
            if reexpress is not None:
                replaced["call"] = reexpress(operation, operation.call)
            if replaced:
                stack.enter_context(substituted(operation, **replaced))
        yield


def check_trained_twice_differentiably(model: keras.Model) -> None:
    """Refuses a Functional model whose second derivatives cannot be trusted in training mode.

    Raises:
        UnsupportedModelError: Naming every layer or operation, and why.
    """
    check_second_derivatives(model, training=True, mended=mends)
    if runs_code_of_others(model):
        specifications = [tf.TensorSpec(x.shape, x.dtype) for x in model.inputs]
        x = specifications[0] if len(specifications) == 1 else specifications
        with twice_differentiable(model):
            check_executed_operations(model, x, training=True)


def mends(operation: keras.Operation) -> bool:
    """Whether `twice_differentiable` mends an operation's second derivative.

    Args:
        operation: A layer or operation from the list of `second_derivative_faults`.

    Returns:
        False for a subclass with a `call` of its own too: nobody knows what that computes.
    """
    if isinstance(operation, keras.layers.BatchNormalization) and exact.renormalizes(operation):
        return False
    if _reexpression(operation) is not None:
        return True
    return not isinstance(operation, tuple(_OF_LAYERS)) and bool(softsign_attributes(operation))


def _reexpression(operation: keras.Operation) -> Callable[[Any, Call], Call] | None:
    """Makes the new `call` of an operation out of the old one; None to leave it as it is."""
    if not isinstance(operation, keras.Layer):
        return _OF_OPERATIONS.get(type(operation).__name__)
    for kind, reexpress in _OF_LAYERS.items():
        if isinstance(operation, kind) and type(operation).call is kind.call:
            return reexpress
    return None
