"""Normalizations as the converter takes them apart: operations of the int8 file, in their order.

It computes `x g + (beta - mean g)` with `g = gamma / sqrt(variance + epsilon)`. No runtime negates
or squares int8 values, so that these are done in float32 between a DEQUANTIZE and a QUANTIZE.
Layers without scale or shift have fewer operations than are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["EACH", "NORMALIZATIONS", "PARAMETERS", "WHOLE", "Part"]

# Shapes of results: all entries, one for each mean, or one for each channel.
WHOLE, EACH, PARAMETERS = "whole", "each", "parameters"


@dataclass(frozen=True)
class Part:
    """One operation.

    Attributes:
        kernel: Name of the operation in the schema.
        writes: Name of its result.
        reads: Names of what it reads; ``"x"`` is what the layer reads.
        shape: Shape of the result.
        width: Bytes of each entry.
        constants: Tensors that the file holds for it.
    """

    kernel: str
    writes: str
    reads: tuple[str, ...]
    shape: str
    width: int = 1
    constants: int = 0


def _negated_mean(of: str) -> list[Part]:
    return [
        Part("MEAN", "mean", (of,), EACH, constants=1),
        Part("DEQUANTIZE", "float", ("mean",), EACH, 4),
        Part("NEG", "negated", ("float",), EACH, 4),
        Part("QUANTIZE", "minus", ("negated",), EACH),
    ]


def _squared(of: str) -> list[Part]:
    return [
        Part("DEQUANTIZE", "wide", (of,), WHOLE, 4),
        Part("SQUARE", "square", ("wide",), WHOLE, 4),
        Part("QUANTIZE", "squared", ("square",), WHOLE),
    ]


def _scale(shape: str, scaled: str) -> list[Part]:
    """From squared deviations to `g`, in which gamma may be."""
    return [
        Part("MEAN", "variance", ("squared",), shape),
        Part("ADD", "positive", ("variance",), shape, constants=1),
        Part("RSQRT", "inverse", ("positive",), shape),
        Part("MUL", "g", ("inverse",), scaled, constants=1),
    ]


def _shift(of: str, shift: str) -> list[Part]:
    return [
        Part("MUL", "product", ("minus", "g"), shift),
        Part("ADD", "shift", ("product",), shift, constants=1),
        Part("MUL", "scaled", (of, "g"), WHOLE),
        Part("ADD", "y", ("scaled", "shift"), WHOLE),
    ]


# Layers by class name, whose last part writes the result of the layer.
NORMALIZATIONS: MappingProxyType[str, tuple[Part, ...]] = MappingProxyType(
    {
        "LayerNormalization": (
            *_negated_mean("x"),
            Part("SQUARED_DIFFERENCE", "squared", ("x", "mean"), WHOLE),
            *_scale(EACH, WHOLE),
            *_shift("x", WHOLE),
        ),
        "RMSNormalization": (
            *_squared("x"),
            *_scale(EACH, EACH),
            Part("MUL", "y", ("x", "g"), WHOLE, constants=1),
        ),
        "GroupNormalization": (
            Part("RESHAPE", "groups", ("x",), WHOLE, constants=1),
            *_negated_mean("groups"),
            Part("SUB", "deviation", ("groups", "mean"), WHOLE),
            *_squared("deviation"),
            *_scale(EACH, PARAMETERS),
            *_shift("groups", PARAMETERS),
            Part("RESHAPE", "z", ("y",), WHOLE, constants=1),
        ),
    }
)
