"""Formats that the TFLite converter does not have: int4 weights, and int8 weights only.

They are made from the finished float32 file by ai-edge-quantizer, an optional extra. Its static
formats, which calibrate activations by a moving average that saturates, are not used.
"""

from __future__ import annotations

from types import MappingProxyType

from tf_kfacprune.errors import ExportError

__all__ = ["RECIPES", "requantized"]

# Format -> recipe of ai-edge-quantizer. wi4, wi8: bits of weights; afp32: float activations.
RECIPES = MappingProxyType({"int4": "dynamic_wi4_afp32", "weight_only": "weight_only_wi8_afp32"})


def requantized(content: bytes, quantization: str) -> bytes:
    """A float32 ``.tflite`` file with quantized weights.

    Args:
        content: the float32 file.
        quantization: one of `RECIPES`.

    Returns:
        The content of the new file.

    Raises:
        ExportError: if the extra is not installed or fails.
    """
    try:
        from ai_edge_quantizer import quantizer, recipe
    except ImportError as error:
        raise ExportError(
            f"quantization={quantization!r} needs ai-edge-quantizer, which is not installed. "
            "Install it with pip install 'tf_kfacprune[quantizer]', or use 'dynamic'."
        ) from error
    work = quantizer.Quantizer(content)
    work.load_quantization_recipe(getattr(recipe, RECIPES[quantization])())
    return bytes(work.quantize().quantized_model)
