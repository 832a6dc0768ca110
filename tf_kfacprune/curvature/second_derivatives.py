"""Operations whose second derivative TensorFlow gets wrong, or does not have.

Every entry was measured against finite differences of the (correct) first derivative. *Wrong*
means silently wrong: the Hessian-vector product of a bilinear resize is zero, that of
`LayerNormalization` is off by percents, because `tf.nn.moments` stops a gradient which vanishes
at first order but not at second. *Missing* means that TensorFlow raises. Most of them are right
within `twice_differentiable`, which tells which by its function `mends`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature.exact_normalization import renormalizes
from tf_kfacprune.errors import UnsupportedModelError

__all__ = [
    "SecondDerivativeFault",
    "check_second_derivatives",
    "reachable_operations",
    "second_derivative_faults",
    "softsign_attributes",
]

MOMENTS_STOP_GRADIENT = (
    "tf.nn.moments stops a gradient that matters at second order; the result is off by percents"
)
RESIZE_HAS_NO_SECOND_DERIVATIVE = "image resizing has no second derivative (bilinear gives zeros)"
MAP_COORDINATES_IS_WRONG = "the second derivative of map_coordinates is wrong"
SOFTSIGN_HAS_NO_SECOND_DERIVATIVE = "softsign has no second derivative in TensorFlow"
RENORM_HAS_NO_OBJECTIVE = (
    "renorm=True holds correction factors constant; the gradient is that of no objective"
)


@dataclass(frozen=True)
class SecondDerivativeFault:
    """One layer or operation that rules out exact second derivatives.

    Attributes:
        name: Name of the layer or operation.
        kind: Its class name.
        reason: What is wrong, one of this module's constants.
        in_jacobian: Whether products with the Jacobian, taken by differentiating twice as for the
            Gauss-Newton matrix, are affected too.
    """

    name: str
    kind: str
    reason: str
    in_jacobian: bool


_OPERATION_FAULTS = {
    "LayerNorm": (MOMENTS_STOP_GRADIENT, False),
    "Moments": (MOMENTS_STOP_GRADIENT, False),
    "Resize": (RESIZE_HAS_NO_SECOND_DERIVATIVE, True),
    "MapCoordinates": (MAP_COORDINATES_IS_WRONG, True),
    "ElasticTransform": (MAP_COORDINATES_IS_WRONG, True),
    "Softsign": (SOFTSIGN_HAS_NO_SECOND_DERIVATIVE, True),
}


def _mends_nothing(operation: keras.Operation) -> bool:
    del operation
    return False


def second_derivative_faults(
    model: keras.Model,
    *,
    training: bool = False,
    mended: Callable[[keras.Operation], bool] = _mends_nothing,
) -> list[SecondDerivativeFault]:
    """Lists the parts of a model whose second derivatives cannot be trusted.

    Args:
        model: Any Keras model; nested models and wrapped layers are searched too.
        training: Whether the model runs in training mode, BatchNormalization with statistics of
            the batch.
        mended: Which operations are run by another expression that is right:
            `twice_differentiable.mends`, or none.

    Returns:
        The faults, in the order in which the parts are found; empty for a sound model.
    """
    faults = []
    for operation in reachable_operations(model):
        reason, in_jacobian = _fault_of(operation, training)
        if reason and not mended(operation):
            kind = type(operation).__name__
            faults.append(SecondDerivativeFault(operation.name, kind, reason, in_jacobian))
    return faults


def check_second_derivatives(
    model: keras.Model,
    *,
    jacobian_only: bool = False,
    training: bool = False,
    mended: Callable[[keras.Operation], bool] = _mends_nothing,
) -> None:
    """Refuses a model whose second derivatives cannot be trusted.

    Args:
        model: Any Keras model.
        jacobian_only: Whether only faults that affect Jacobian products count.
        training: Whether the model runs in training mode.
        mended: Which operations are run by another expression that is right, as for
            `second_derivative_faults`.

    Raises:
        UnsupportedModelError: Naming every such layer or operation, and why.
    """
    faults = second_derivative_faults(model, training=training, mended=mended)
    faults = [fault for fault in faults if fault.in_jacobian or not jacobian_only]
    if faults:
        listing = "; ".join(f"{f.name!r} ({f.kind}): {f.reason}" for f in faults)
        remedy = (
            "" if any(f.in_jacobian for f in faults) else " The 'ggn' curvature is exact for it."
        )
        raise UnsupportedModelError(
            f"Model {model.name!r} has no trustworthy second derivatives: {listing}.{remedy}"
        )


def softsign_attributes(operation: keras.Operation) -> list[str]:
    """Names of the attributes of an operation, `activation` for example, that are softsign."""
    functions = (keras.activations.softsign, keras.ops.softsign, tf.nn.softsign)
    return [name for name, value in vars(operation).items() if any(value is f for f in functions)]


def _fault_of(operation: keras.Operation, training: bool) -> tuple[str, bool]:
    """``(reason, affects Jacobian products)``, with an empty reason for a sound operation."""
    layers = keras.layers
    if isinstance(operation, layers.BatchNormalization) and training and operation.trainable:
        if renormalizes(operation):
            return RENORM_HAS_NO_OBJECTIVE, False
        # Synchronized over replicas, it takes a route without tf.nn.moments.
        return ("", False) if operation.synchronized else (MOMENTS_STOP_GRADIENT, False)
    if isinstance(operation, layers.LayerNormalization):
        # With rms_scaling Keras takes a route without tf.nn.moments.
        return ("", False) if operation.rms_scaling else (MOMENTS_STOP_GRADIENT, False)
    if isinstance(operation, layers.GroupNormalization):
        return MOMENTS_STOP_GRADIENT, False
    if isinstance(operation, layers.UpSampling2D) and operation.interpolation != "nearest":
        return RESIZE_HAS_NO_SECOND_DERIVATIVE, True
    if isinstance(operation, layers.Resizing):
        return RESIZE_HAS_NO_SECOND_DERIVATIVE, True
    if softsign_attributes(operation):
        return SOFTSIGN_HAS_NO_SECOND_DERIVATIVE, True
    if isinstance(operation, keras.Layer):
        return "", False
    kind = type(operation).__name__
    if getattr(operation, "rms_scaling", False) or getattr(operation, "synchronized", False):
        return "", False  # routes of LayerNorm and Moments without tf.nn.moments
    return _OPERATION_FAULTS.get(kind, ("", False))


def reachable_operations(root: keras.Operation) -> Iterator[keras.Operation]:
    """All layers and operations reachable from one, each once, through models and wrappers."""
    seen: set[int] = set()
    pending: list[Any] = [root]
    while pending:
        item = pending.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, keras.Operation):
            yield item
            pending += [v for v in vars(item).values() if isinstance(v, keras.Operation | Iterable)]
            pending += getattr(item, "operations", ())
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple | set):
            pending += [v for v in item if isinstance(v, keras.Operation | dict | list | tuple)]
