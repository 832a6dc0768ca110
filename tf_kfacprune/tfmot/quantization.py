"""Quantization-aware training, annotated layer by layer."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.tfmot.decisions import QuantizationReport, decide
from tf_kfacprune.tfmot.legacy import Legacy, is_legacy_model, legacy_packages
from tf_kfacprune.tfmot.translation import to_tf_keras

__all__ = ["quantization_report", "quantize_aware"]


def quantization_report(model: keras.Model) -> QuantizationReport:
    """Which layers quantization-aware training would quantize, and why others stay float.

    Args:
        model: a built Keras 3 model without gates.

    Returns:
        One decision for every layer of the translated model.

    Raises:
        UnsupportedModelError: if the model cannot be translated.
        ExportError: if the extra is not installed.

    Examples:
        >>> import tf_kfacprune as kp
        >>> print(kp.tfmot.quantization_report(small))  # doctest: +SKIP
        7 of 7 layers are quantized.
    """
    return decide(_translated(model), legacy_packages())


def quantize_aware(
    model: keras.Model, *, preserve_sparsity: bool = False, preserve_clusters: bool = False
) -> Any:
    """A ``tf_keras`` model that is trained as if it were int8 already.

    Compile and fit it with ``tf_keras`` losses and optimizers, some epochs at a small learning
    rate, then write it with ``kp.export.tflite(trained, path, quantization="qat")``. Layers that
    stay float are listed in one warning and by `quantization_report`.

    Args:
        model: a built Keras 3 model without gates, trained; or what `to_tf_keras`, or stripped
            `cluster` and `sparsify` models, made of one.
        preserve_sparsity: keep zero weights zero.
        preserve_clusters: keep the number of different weights of each kernel.

    Returns:
        A model with the weights of ``model`` and the ranges of activations still to be learned.

    Raises:
        UnsupportedModelError: if the model cannot be translated, or no layer can be quantized.
        ParityError: if the translation differs.
        ExportError: if the extra is not installed.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", section 3.

    Examples:
        >>> import tf_kfacprune as kp
        >>> trainee = kp.tfmot.quantize_aware(small)  # doctest: +SKIP
    """
    legacy = legacy_packages()
    translated = _translated(model)
    report = decide(translated, legacy)
    if report.floating:
        warnings.warn(str(report), stacklevel=2)
    if len(report.floating) == len(report.layers):
        raise UnsupportedModelError(
            f"No layer of model {model.name!r} can be quantized in training. Use "
            "kp.export.tflite(quantization='int8') with representative_data."
        )
    quantize = legacy.tfmot.quantization.keras
    quantized = {one.name for one in report.layers if one.quantized}
    readers = _producers_of(translated, quantized)
    output_only = _output_only(legacy)

    def annotate(layer: Any) -> Any:
        copy = type(layer).from_config(layer.get_config())
        if layer.name in quantized:
            return quantize.quantize_annotate_layer(copy)
        if layer.name in readers and len(layer.inbound_nodes) == 1:
            return quantize.quantize_annotate_layer(copy, quantize_config=output_only())
        return copy

    annotated = legacy.keras.models.clone_model(translated, clone_function=annotate)
    annotated.set_weights(translated.get_weights())
    with quantize.quantize_scope({output_only.__name__: output_only}):
        return quantize.quantize_apply(
            annotated, scheme=_scheme(legacy, preserve_sparsity, preserve_clusters)
        )


def _translated(model: Any) -> Any:
    return model if is_legacy_model(model) else to_tf_keras(model)


def _scheme(legacy: Legacy, preserve_sparsity: bool, preserve_clusters: bool) -> Any:
    combine = legacy.tfmot.experimental.combine
    if preserve_clusters:
        return combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=preserve_sparsity)
    if preserve_sparsity:
        return combine.Default8BitPrunePreserveQuantizeScheme()
    return legacy.tfmot.quantization.keras.default_8bit.Default8BitQuantizeScheme()


def _output_only(legacy: Legacy) -> Any:
    """How a layer that stays float is annotated: its output is quantized, nothing else.

    A quantized layer behind it gets integers to read; else it would stay float too.
    """
    quantize = legacy.tfmot.quantization.keras

    class OutputOnly(quantize.QuantizeConfig):  # type: ignore[name-defined]
        def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
            return []

        def get_activations_and_quantizers(self, layer: Any) -> list[Any]:
            return []

        def set_quantize_weights(self, layer: Any, quantize_weights: Any) -> None:
            pass

        def set_quantize_activations(self, layer: Any, quantize_activations: Any) -> None:
            pass

        def get_output_quantizers(self, layer: Any) -> list[Any]:
            return [
                quantize.quantizers.MovingAverageQuantizer(
                    num_bits=8, per_axis=False, symmetric=False, narrow_range=False
                )
            ]

        def get_config(self) -> dict[str, Any]:
            return {}

    return OutputOnly


def _producers_of(model: Any, readers: set[str]) -> set[str]:
    """Names of the layers whose output one of the readers reads."""
    found: set[str] = set()
    for layer in model.layers:
        if layer.name not in readers:
            continue
        for node in layer.inbound_nodes:
            producers = node.inbound_layers
            for producer in producers if isinstance(producers, list) else [producers]:
                found.add(producer.name)
    return found
