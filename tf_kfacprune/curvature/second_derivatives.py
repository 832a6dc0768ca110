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
from tf_kfacprune.curvature.linear_map import MENDED_SCOPE
from tf_kfacprune.errors import UnsupportedModelError

__all__ = [
    "SecondDerivativeFault",
    "check_executed_operations",
    "check_second_derivatives",
    "reachable_operations",
    "runs_code_of_others",
    "second_derivative_faults",
    "softsign_attributes",
]

MOMENTS_STOP_GRADIENT = (
    "tf.nn.moments stops a gradient that matters at second order; the result is off by percents"
)
RESIZE_HAS_NO_SECOND_DERIVATIVE = "image resizing has no second derivative (bilinear gives zeros)"
TRANSFORM_IS_WRONG = "TensorFlow's gradient of an image transform is not that of the transform"
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
    "AffineTransform": (TRANSFORM_IS_WRONG, True),
    "PerspectiveTransform": (TRANSFORM_IS_WRONG, True),
    "Softsign": (SOFTSIGN_HAS_NO_SECOND_DERIVATIVE, True),
}


# The same, by what TensorFlow executes: for layers that compute in a `call` of their own.
_NODE_FAULTS = {
    "ImageProjectiveTransformV2": (TRANSFORM_IS_WRONG, True),
    "ImageProjectiveTransformV3": (TRANSFORM_IS_WRONG, True),
    "ResizeBicubic": (RESIZE_HAS_NO_SECOND_DERIVATIVE, True),
    "ResizeBilinear": (RESIZE_HAS_NO_SECOND_DERIVATIVE, True),
    "ScaleAndTranslate": (RESIZE_HAS_NO_SECOND_DERIVATIVE, True),
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
    _refuse(model, second_derivative_faults(model, training=training, mended=mended), jacobian_only)


def check_executed_operations(
    model: keras.Model, x: Any, *, jacobian_only: bool = False, training: bool = False
) -> Any:
    """Refuses a model that executes an operation whose second derivative cannot be trusted.

    What layers of the user's own compute in `call` is seen by nothing else. What is done to inputs
    before any parameter enters is no matter. Called within `twice_differentiable`, which leaves
    only what it does not mend.

    Args:
        model: Any Keras model.
        x: What it is called on: tensors, or their specifications.
        jacobian_only: Whether only faults that affect Jacobian products count.
        training: Whether the model runs in training mode.

    Returns:
        What the model returns, as specifications.

    Raises:
        UnsupportedModelError: Naming every such operation, by its place in the graph, and why.
    """

    def call(inputs: Any) -> Any:
        return model(inputs, training=training)

    traced = tf.function(call).get_concrete_function(x)
    inner = traced.graph.as_graph_def().library.function  # bodies of loops and branches
    nodes = [
        *_behind_parameters(traced.graph, model),
        *(n for part in inner for n in part.node_def),
    ]
    faults = [
        SecondDerivativeFault(node.name, node.op, *fault)
        for node in nodes
        if (fault := _fault_of_node(node)) is not None
    ]
    _refuse(model, faults, jacobian_only)
    return traced.structured_outputs


def runs_code_of_others(model: keras.Model) -> bool:
    """Whether a model has layers or functions that are neither Keras' nor this package's."""
    return any(
        isinstance(operation, keras.layers.Lambda)
        or type(operation).__module__.partition(".")[0] not in ("keras", "tf_kfacprune")
        for operation in reachable_operations(model)
    )


def _behind_parameters(graph: Any, model: keras.Model) -> list[Any]:
    """Definitions of the operations of a graph that depend on a trainable variable."""
    handles = {id(variable.value.handle) for variable in model.trainable_variables}
    depending = {inner.op.name for outer, inner in graph.captures if id(outer) in handles}
    found = []
    for operation in graph.get_operations():  # in the order of their making
        if any(tensor.op.name in depending for tensor in operation.inputs):
            depending.add(operation.name)
            found.append(operation.node_def)
    return found


def _fault_of_node(node: Any) -> tuple[str, bool] | None:
    scopes = node.name.split("/")
    if MENDED_SCOPE in scopes:
        return None
    if node.op == "StopGradient" and any(scope.startswith("moments") for scope in scopes):
        return MOMENTS_STOP_GRADIENT, False
    return _NODE_FAULTS.get(node.op)


def _refuse(model: keras.Model, faults: list[SecondDerivativeFault], jacobian_only: bool) -> None:
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
