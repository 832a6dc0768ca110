"""Which input and output of a file is which of the Keras model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tf_kfacprune.export.file_interface import FileTensor, read_interface
from tf_kfacprune.export.serving import Signature

__all__ = ["Port", "Ports", "ports_of"]


@dataclass(frozen=True)
class Port:
    """One input or output of a ``.tflite`` file, and what it is in Keras.

    Attributes:
        keras: its name in Keras: the key, where the model was built with a dictionary; else the
            name of the Input, or of the layer that puts the output out.
        name: its name in the file's signature ``serving_default``.
        index: its place in the file: of ``interpreter->input(index)`` in C++, and in
            ``Interpreter.get_input_details()`` in Python; likewise for outputs.
    """

    keras: str
    name: str
    index: int


# Inputs and outputs, each in the order of the Keras model.
Ports = tuple[tuple[Port, ...], tuple[Port, ...]]


def ports_of(model: keras.Model, signature: Signature, content: bytes) -> Ports:
    """Inputs and outputs of a file, each in the order of the Keras model.

    Args:
        model: the Keras model.
        signature: names of its inputs and outputs in the file.
        content: the file that was made of it.

    Returns:
        The inputs and the outputs.
    """
    file = read_interface(content)
    inputs = _keras_names(model, "input", [tensor.name for tensor in model.inputs])
    outputs = _keras_names(model, "output", _output_layers(model))
    return (
        _ports(inputs, list(signature.inputs), file.inputs),
        _ports(outputs, signature.outputs, file.outputs),
    )


def _ports(
    keras_names: Sequence[str], names: Sequence[str], tensors: Sequence[FileTensor]
) -> tuple[Port, ...]:
    places = {tensor.name: index for index, tensor in enumerate(tensors)}
    pairs = zip(keras_names, names, strict=True)
    return tuple(Port(own, name, places[name]) for own, name in pairs)


def _keras_names(model: Any, side: str, layers: list[str]) -> list[str]:
    structure = None if isinstance(model, keras.Sequential) else getattr(model, side)
    if isinstance(structure, dict) and len(structure) == len(layers):
        return [str(key) for key in sorted(structure)]
    return layers


def _output_layers(model: Any) -> list[str]:
    names = getattr(model, "output_names", None)
    return list(names) if names else [model.layers[-1].name]
