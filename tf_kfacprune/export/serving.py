"""A Keras model as a served function with stable names, and the models that are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.tfmot.legacy import is_legacy_model
from tf_kfacprune.validation import is_count

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["SIGNATURE", "Signature", "check_exportable", "layers_within", "served_module"]

SIGNATURE = "serving_default"

# Names that Keras makes up count the tensors of the session: they differ from call to call.
_MADE_UP_NAME = re.compile(r"(input_layer|keras_tensor)(_\d+)?")


@dataclass(frozen=True)
class Signature:
    """Names, shapes and dtypes of a model's inputs, and the names of its outputs.

    Attributes:
        inputs: name -> (shape with the batch axis, dtype), in the model's own order. None stands
            for a free size.
        outputs: names, in the model's own order.
    """

    inputs: dict[str, tuple[tuple[int | None, ...], str]]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: keras.Model, batch_size: int | None = None) -> Signature:
        """Signature of a functional model.

        Inputs and outputs that were given as a dictionary are named by its keys. Else an Input
        that has a name keeps it, and others are ``input`` or ``input_0``, ``input_1``...; outputs
        are ``output`` or ``output_0``, ``output_1``...
        """
        inputs = {
            name: (
                (batch_size or tensor.shape[0], *tensor.shape[1:]),
                keras.backend.standardize_dtype(tensor.dtype),
            )
            for name, tensor in zip(_input_names(model), model.inputs, strict=True)
        }
        if len(inputs) != len(model.inputs):
            raise UnsupportedModelError(
                "The model's inputs must have different names. Received: "
                f"{[tensor.name for tensor in model.inputs]}. Name them with keras.Input(name=...)."
            )
        return cls(inputs, tuple(_output_names(model)))

    @property
    def input_dtypes(self) -> dict[str, str]:
        """Element types of the inputs, by what messages call them."""
        return {f"input {name!r}": dtype for name, (_, dtype) in self.inputs.items()}

    def in_float32(self) -> Signature:
        """The signature with inputs of half precision as float32."""
        halves = ("float16", "bfloat16")
        return replace(
            self,
            inputs={
                name: (shape, "float32" if dtype in halves else dtype)
                for name, (shape, dtype) in self.inputs.items()
            },
        )

    def name_outputs(self, outputs: Any) -> dict[str, Any]:
        """What the model returned, by output name."""
        return dict(zip(self.outputs, keras.tree.flatten(outputs), strict=True))

    def arrange_inputs(self, model: keras.Model, named: dict[str, Any]) -> Any:
        """Named input tensors in the structure that the model was built with."""
        flat = [named[name] for name in self.inputs]
        if isinstance(model, keras.Sequential):
            return flat[0]
        return keras.tree.pack_sequence_as(model.input, flat)

    def predict(self, model: keras.Model, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The Keras model's own inference output, as float32 where it is in half precision.

        Text comes as bytes, and is given as bytes.

        Computed on the CPU, like the files it is compared with: a GPU may round to TF32.
        """
        count = len(next(iter(named.values())))
        size = model.inputs[0].shape[0] or count
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.outputs}
        for start in range(0, count, size):
            # A model of fixed batch size gets its last batch filled up with the last example.
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = {name: values[rows] for name, values in named.items()}
            with keras.device("cpu:0"):
                given = keras.tree.map_structure(
                    keras.ops.convert_to_tensor, self.arrange_inputs(model, batch)
                )
                outputs = model(given, training=False)
            for name, tensor in self.name_outputs(outputs).items():
                parts[name].append(_plain(np.asarray(keras.ops.convert_to_numpy(tensor))))
        return {name: np.concatenate(arrays)[:count] for name, arrays in parts.items()}


def check_exportable(
    model: keras.Model, batch_size: int | None = None, *, legacy: bool = False
) -> None:
    """Refuses what cannot be exported faithfully.

    Args:
        model: the model.
        batch_size: the only batch size to serve, or None.
        legacy: expect a model of ``tf_keras``, trained for quantization.

    Raises:
        UnsupportedModelError: if ``model`` is not a built Sequential or Functional model, or holds
            layers of this package.
        InvalidArgumentError: if ``batch_size`` is not a positive integer or None.
    """
    if is_legacy_model(model) and not legacy:
        raise UnsupportedModelError(
            f"Model {model.name!r} is of tf_keras. A quantization-aware one is exported with "
            "kp.export.tflite(quantization='qat'); bring the weights of another one back to the "
            "Keras 3 model with kp.tfmot.copy_back and export that."
        )
    if legacy and not is_legacy_model(model):
        raise UnsupportedModelError(
            "quantization='qat' (quantization-aware training) takes the trained result of "
            f"kp.tfmot.quantize_aware(model), which is a tf_keras model. Received: "
            f"{type(model).__name__} {getattr(model, 'name', '')!r}. Without such training use "
            "'int8' with representative_data."
        )
    if legacy and not any("Quantize" in type(layer).__name__ for layer in model.layers):
        raise UnsupportedModelError(
            f"Model {model.name!r} has not been made quantization-aware. Pass it to "
            "kp.tfmot.quantize_aware and train the result first."
        )
    if not legacy and not isinstance(model, keras.Model):
        raise UnsupportedModelError(
            f"Only a Keras model can be exported. Received: {type(model).__name__}."
        )
    for layer in layers_within(model):
        if type(layer).__module__.split(".")[0] == __name__.split(".")[0]:
            raise UnsupportedModelError(
                f"Model {model.name!r} still has gates: layer {layer.name!r} "
                f"({type(layer).__name__}). Call tf_kfacprune.compact(model) first and export its "
                "result."
            )
    if not getattr(model, "inputs", None):
        raise UnsupportedModelError(
            f"Model {model.name!r} ({type(model).__name__}) has no symbolic inputs. Expected a "
            "built Sequential or Functional model: give a Sequential a keras.Input, and rewrite "
            "a subclassed model with keras.Model(inputs, outputs)."
        )
    if batch_size is not None and not is_count(batch_size):
        raise InvalidArgumentError(
            "batch_size must be a positive integer, or None for any size. Received: "
            f"batch_size={batch_size!r}."
        )
    own = model.inputs[0].shape[0]
    if None not in (own, batch_size) and own != batch_size:
        raise InvalidArgumentError(
            f"Model {model.name!r} was built for batches of {own}. Received: "
            f"batch_size={batch_size!r}. Leave batch_size out, or rebuild the model without it."
        )


def layers_within(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layer and every layer nested in it: in models, wrappers and layer attributes."""
    seen: set[int] = set()
    waiting = [layer]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting.extend(getattr(current, "layers", None) or [])
        waiting.extend(part for part in _attributes(current) if isinstance(part, keras.Layer))


def _attributes(layer: keras.layers.Layer) -> Iterator[Any]:
    """The attributes of a layer, and what is in those that are collections."""
    for value in vars(layer).values():
        if isinstance(value, dict):
            value = list(value.values())
        yield from value if isinstance(value, list | tuple) else [value]


def served_module(
    model: keras.Model, signature: Signature
) -> tuple[tf.Module, tf.types.experimental.ConcreteFunction]:
    """A module that holds each weight once, and its one endpoint.

    ``keras.Model.export`` tracks the weights twice (as variables and as the layers'), which
    doubles the folder; this module tracks the variables, and the tables of layers that look
    things up, only.
    """
    import tensorflow as tf

    specs = {
        name: tf.TensorSpec(shape, dtype, name=name)
        for name, (shape, dtype) in signature.inputs.items()
    }

    @tf.function(autograph=False)
    def serve(**named: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = model(signature.arrange_inputs(model, named), training=False)
        return {
            name: tf.cast(t, tf.float32) if t.dtype in (tf.float16, tf.bfloat16) else t
            for name, t in signature.name_outputs(outputs).items()
        }

    module = tf.Module()
    module.weights = [_variable(weight) for weight in model.weights]
    module.tables = _tables(model)
    module.serve = serve
    return module, serve.get_concrete_function(**specs)


def _variable(weight: Any) -> Any:
    """The TensorFlow variable of a Keras 3 variable; a tf_keras one is a TensorFlow variable."""
    return weight.value if isinstance(weight, keras.Variable) else weight


def _tables(model: keras.Model) -> list[Any]:
    """Lookup tables and the like, which layers for text keep as attributes: they are no weights."""
    import tensorflow as tf

    kind = tf.saved_model.experimental.TrackableResource
    found = {
        id(part): part
        for layer in layers_within(model)
        for part in _attributes(layer)
        if isinstance(part, kind)
    }
    return list(found.values())


def _input_names(model: keras.Model) -> list[str]:
    keys = _keys(model, "input", len(model.inputs))
    if keys:
        return keys
    single = len(model.inputs) == 1
    names = [re.sub(r"\W", "_", tensor.name) for tensor in model.inputs]
    return [
        ("input" if single else f"input_{i}") if _MADE_UP_NAME.fullmatch(name) else name
        for i, name in enumerate(names)
    ]


def _output_names(model: keras.Model) -> list[str]:
    count = len(model.outputs)
    return _keys(model, "output", count) or (
        ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    )


def _keys(model: keras.Model, side: str, count: int) -> list[str]:
    """Keys of a model built with a flat dictionary of inputs or outputs, in flattened order."""
    structure = None if isinstance(model, keras.Sequential) else getattr(model, side)
    if not isinstance(structure, dict) or len(structure) != count:
        return []
    return [re.sub(r"\W", "_", str(key)) for key in sorted(structure)]


def _plain(array: np.ndarray) -> np.ndarray:
    """Half precision as float32, as the served function returns it, and text as bytes."""
    if array.dtype == object:
        return array.astype(bytes)
    is_half = keras.backend.is_float_dtype(str(array.dtype)) and array.dtype.itemsize < 4
    return array.astype(np.float32) if is_half else array
