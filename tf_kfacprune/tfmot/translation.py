"""Translates a Keras 3 model into one of tf_keras that computes the same.

Layers become the layers of the same name, configured by their own config: an argument that
tf_keras does not know must have its default value. Weights are copied by role. Activations and
operations that tf_keras lacks are composed of layers it has. What cannot be translated faithfully
is refused by name, and the outputs of both models are compared at the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_kfacprune.errors import ParityError, UnsupportedModelError
from tf_kfacprune.graph import Call, Value, trace
from tf_kfacprune.tfmot.activations import FUSED, composed, legacy_name
from tf_kfacprune.tfmot.legacy import legacy_packages

__all__ = ["layer_names", "to_tf_keras", "weights_by_role"]

# Layers that mean the same in both packages.
_SAME = {
    *("Activation", "ActivityRegularization", "Add", "Average", "AveragePooling1D"),
    *("AveragePooling2D", "BatchNormalization", "Concatenate", "Conv1D", "Conv2D"),
    *("Conv2DTranspose", "Cropping1D", "Cropping2D", "Dense", "DepthwiseConv2D", "Dropout", "ELU"),
    *("Flatten", "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalMaxPooling1D"),
    *("GlobalMaxPooling2D", "LayerNormalization", "LeakyReLU", "MaxPooling1D", "MaxPooling2D"),
    *("Maximum", "Minimum", "Multiply", "Normalization", "PReLU", "Permute", "ReLU", "Rescaling"),
    *("Reshape", "SeparableConv1D", "SeparableConv2D", "Softmax", "SpatialDropout1D"),
    *("SpatialDropout2D", "Subtract", "UpSampling2D", "ZeroPadding1D", "ZeroPadding2D"),
}
_RENAMED = {"LeakyReLU": {"negative_slope": "alpha"}}
_ROLES = {"DepthwiseConv2D": {"kernel": "depthwise_kernel"}}
_TOLERANCE = 1e-4
_UNKNOWN_SIZE = 32


def to_tf_keras(model: keras.Model) -> Any:
    """Translates a Keras 3 model into a ``tf_keras`` model with the same weights.

    Args:
        model: a built Sequential or Functional model without gates; nested models are inlined.

    Returns:
        A functional ``tf_keras`` model, whose outputs were compared with those of ``model``.

    Raises:
        UnsupportedModelError: if a layer or operation cannot be translated; the message names it.
        ParityError: if the outputs differ.
        ExportError: if the extra is not installed.

    Examples:
        >>> import tf_kfacprune as kp
        >>> legacy = kp.tfmot.to_tf_keras(small)  # doctest: +SKIP
    """
    legacy = legacy_packages().keras
    graph = trace(model)
    names = layer_names(model)
    layers: dict[int, Any] = {}
    tensors: dict[Value, Any] = {}
    inputs = []
    for value, name in zip(graph.inputs, graph.input_names, strict=True):
        if "float" not in value.dtype:
            raise UnsupportedModelError(
                f"Input {name!r} is of dtype {value.dtype}: only float inputs can be translated."
            )
        tensors[value] = legacy.Input(batch_shape=value.shape, dtype=value.dtype, name=name)
        inputs.append(tensors[value])
    for call, name in zip(graph.calls, names, strict=True):
        given = [tensors[value] for value in call.inputs]
        if call.is_layer:
            key = id(call.operation)
            if key not in layers:
                layers[key] = _layer(call, name, legacy)
            result = layers[key](given[0] if len(given) == 1 else given)
        else:
            result = _operation(call, given, name, legacy)
        if len(call.outputs) != 1:
            raise _refusal(call, "has several outputs")
        tensors[call.outputs[0]] = result
    outputs = [tensors[value] for value in graph.outputs]
    translated = legacy.Model(_only(inputs), _only(outputs), name=model.name)
    for call, name in zip(graph.calls, names, strict=True):
        if call.is_layer and call.operation.weights and not _is_normalization(call.operation):
            _copy_weights(call, translated.get_layer(name))
    _compare(
        model,
        translated,
        [(value.shape, name) for value, name in zip(graph.inputs, graph.input_names, strict=True)],
    )
    return translated


def layer_names(model: keras.Model) -> list[str]:
    """Name of the translated layer for every call of the traced model, in its order."""
    graph = trace(model)
    taken = set(graph.input_names)
    by_layer: dict[int, str] = {}
    names = []
    for call in graph.calls:
        if call.is_layer and id(call.operation) in by_layer:
            names.append(by_layer[id(call.operation)])
            continue
        name = base = call.path.replace("/", "_")
        number = 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        names.append(name)
        if call.is_layer:
            by_layer[id(call.operation)] = name
    return names


def weights_by_role(layer: keras.Layer, translated: Any) -> list[tuple[Any, Any]]:
    """Pairs of a Keras 3 variable and the tf_keras variable with the same role.

    Raises:
        UnsupportedModelError: if a variable has no counterpart of the same shape.
    """
    roles = _ROLES.get(type(layer).__name__, {})
    pairs = []
    for variable in layer.weights:
        if "seed_generator" in variable.path:
            continue
        role = variable.path.rsplit("/", 1)[-1]
        other = getattr(translated, roles.get(role, role), None)
        if other is None or tuple(other.shape) != tuple(variable.shape):
            raise UnsupportedModelError(
                f"Layer {layer.name!r} ({type(layer).__name__}): its weight {role!r} of shape "
                f"{tuple(variable.shape)} has no counterpart in tf_keras."
            )
        pairs.append((variable, other))
    return pairs


def _layer(call: Call, name: str, legacy: Any) -> Callable[[Any], Any]:
    """What to call on translated tensors: one layer, or several in place of it."""
    layer = call.operation
    kind = type(layer).__name__
    if kind == "CustomScaleLayer" and type(layer).__module__.startswith("keras."):
        scale = legacy.layers.Rescaling(layer.scale, name=name)
        return lambda xs: legacy.layers.Add(name=f"{name}_sum")([xs[0], scale(xs[1])])
    if kind not in _SAME or not type(layer).__module__.startswith("keras."):
        raise _refusal(call, "has no counterpart in tf_keras that is known to be equal")
    config = _config(call, name, getattr(legacy.layers, kind), legacy)
    activation = config.get("activation")
    if activation is None or activation in FUSED:
        return _made(call, kind, config, legacy)
    if kind == "Activation":
        return lambda x: composed(activation, x, name, legacy)
    linear = _made(call, kind, {**config, "activation": "linear"}, legacy)
    return lambda x: composed(activation, linear(x), f"{name}_{activation}", legacy)


def _made(call: Call, kind: str, config: dict[str, Any], legacy: Any) -> Any:
    try:
        return getattr(legacy.layers, kind)(**config)
    except (TypeError, ValueError) as error:
        raise _refusal(call, f"is not taken by tf_keras: {error}") from error


def _config(call: Call, name: str, target: Any, legacy: Any) -> dict[str, Any]:
    """Arguments of the tf_keras layer, from the Keras 3 layer's own config."""
    layer = call.operation
    kind = type(layer).__name__
    if layer.compute_dtype != "float32":
        raise _refusal(call, f"computes in {layer.compute_dtype}; only float32 can be translated")
    taken = {"name", "trainable", *inspect.signature(target.__init__).parameters}
    defaults = inspect.signature(type(layer).__init__).parameters
    config: dict[str, Any] = {}
    for key, value in layer.get_config().items():
        role = _RENAMED.get(kind, {}).get(key, key)
        if key == "dtype" or key.endswith("_initializer"):
            continue  # float32, and all weights are copied
        if key == "activation":
            config[key] = legacy_name(layer.activation)
            if config[key] is None:
                raise _refusal(call, f"has an activation that tf_keras lacks: {value!r}")
        elif key.endswith(("_regularizer", "_constraint")) and value is not None:
            part = legacy.regularizers if key.endswith("_regularizer") else legacy.constraints
            config[key] = part.deserialize(
                {"class_name": value["class_name"], "config": value["config"]}
            )
        elif role in taken:
            config[role] = value
        elif key in defaults and value != defaults[key].default:
            raise _refusal(call, f"has {key}={value!r}, which tf_keras does not know")
    if _is_normalization(layer):
        config["mean"] = np.ravel(keras.ops.convert_to_numpy(layer.mean)).tolist()
        config["variance"] = np.ravel(keras.ops.convert_to_numpy(layer.variance)).tolist()
    return {**config, "name": name}


def _operation(call: Call, given: list[Any], name: str, legacy: Any) -> Any:
    """An operation on tensors as a layer: arithmetic of two tensors, or with a number."""
    kind = type(call.operation).__name__
    arguments = [*call.args, *call.kwargs.values()]
    numbers = [float(x) for x in arguments if isinstance(x, int | float | np.number)]
    layers = legacy.layers
    if len(given) == 2 and len(arguments) == 2 and kind in ("Add", "Subtract", "Multiply"):
        return getattr(layers, kind)(name=name)(given)
    scalings = {
        "Add": lambda number: (1.0, number),
        "Subtract": lambda number: (1.0, -number),
        "Multiply": lambda number: (number, 0.0),
        "TrueDivide": lambda number: (1.0 / number, 0.0),
    }
    first_is_tensor = bool(arguments) and isinstance(arguments[0], Value)
    if (
        (len(given), len(numbers), len(arguments)) == (1, 1, 2)
        and kind in scalings
        and (first_is_tensor or kind in ("Add", "Multiply"))
    ):
        scale, offset = scalings[kind](numbers[0])
        return layers.Rescaling(scale, offset, name=name)(given[0])
    raise _refusal(call, "is an operation that is not translated; use the layer of that purpose")


def _copy_weights(call: Call, translated: Any) -> None:
    for variable, other in weights_by_role(call.operation, translated):
        other.assign(keras.ops.convert_to_numpy(variable))


def _compare(
    model: keras.Model, translated: Any, inputs: list[tuple[tuple[int | None, ...], str]]
) -> None:
    rng = np.random.default_rng(0)
    given = [
        rng.standard_normal([shape[0] or 2, *(size or _UNKNOWN_SIZE for size in shape[1:])]).astype(
            "float32"
        )
        for shape, _ in inputs
    ]
    structure = (
        given[0]
        if isinstance(model, keras.Sequential)
        else (keras.tree.pack_sequence_as(model.input, given))
    )
    with keras.device("cpu:0"):
        expected = keras.tree.flatten(model(structure, training=False))
        found = keras.tree.flatten(translated(_only(given), training=False))
    for i, (one, other) in enumerate(zip(expected, found, strict=True)):
        y, z = keras.ops.convert_to_numpy(one), np.asarray(other)
        error = float(np.max(np.abs(y - z)) / max(np.max(np.abs(y)), 1e-30))
        if not error <= _TOLERANCE:
            raise ParityError(
                f"The translation of model {model.name!r} into tf_keras differs at output {i}: "
                f"relative error {error:.1e}, allowed {_TOLERANCE:.0e}."
            )


def _is_normalization(layer: Any) -> bool:
    return isinstance(layer, keras.layers.Normalization)


def _only(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _refusal(call: Call, why: str) -> UnsupportedModelError:
    kind = type(call.operation).__name__
    return UnsupportedModelError(
        f"{'Layer' if call.is_layer else 'Operation'} {call.path!r} ({kind}) {why}. Without "
        "tensorflow-model-optimization, kp.export.tflite(quantization='int8') takes any model."
    )
