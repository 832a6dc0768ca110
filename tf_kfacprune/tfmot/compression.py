"""Weight clustering and magnitude sparsity, and the way back to Keras 3."""

from __future__ import annotations

from typing import Any

import keras

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph import trace
from tf_kfacprune.tfmot.legacy import is_legacy_model, legacy_packages
from tf_kfacprune.tfmot.translation import layer_names, to_tf_keras, weights_by_role
from tf_kfacprune.validation import is_count

__all__ = ["cluster", "copy_back", "sparsify", "sparsity_callback"]

_CONTRACTIONS = ("Conv1D", "Conv2D", "Conv2DTranspose", "Dense", "SeparableConv2D")


def cluster(model: keras.Model, clusters: int = 16, *, preserve_sparsity: bool = False) -> Any:
    """A ``tf_keras`` model whose kernels have few different weights, to be trained.

    The file gets smaller only compressed: gzip stores repeated values well. After training take
    the weights back with `copy_back`, or go on with `quantize_aware(preserve_clusters=True)`.

    Args:
        model: a built Keras 3 model without gates, trained.
        clusters: number of different weights in each kernel. Kernels with fewer weights than twice
            that, and depthwise kernels, are left alone.
        preserve_sparsity: keep zero weights zero.

    Returns:
        A model with the weights of ``model``, to be compiled and fitted with ``tf_keras``.

    Raises:
        InvalidArgumentError: if ``clusters`` is not an integer of at least 2.
        UnsupportedModelError: if the model cannot be translated.
        ExportError: if the extra is not installed.

    References:
        Han, Mao, Dally 2016, "Deep Compression", section 3.

    Examples:
        >>> import tf_kfacprune as kp
        >>> trainee = kp.tfmot.cluster(small, 16)  # doctest: +SKIP
    """
    if not is_count(clusters) or clusters < 2:
        raise InvalidArgumentError(
            f"clusters must be an integer of at least 2. Received: clusters={clusters!r}."
        )
    tools = legacy_packages().tfmot.clustering.keras
    cluster_weights = tools.cluster_weights
    options: dict[str, Any] = {
        "number_of_clusters": clusters,
        "cluster_centroids_init": tools.CentroidInitialization.KMEANS_PLUS_PLUS,
    }
    if preserve_sparsity:
        # The place that the guide of tensorflow-model-optimization names; no shorter one exists.
        from tensorflow_model_optimization.python.core.clustering.keras.experimental import (
            cluster as experimental,
        )

        cluster_weights = experimental.cluster_weights
        options["preserve_sparsity"] = True
    return _wrapped(model, 2 * clusters, lambda layer: cluster_weights(layer, **options))


def sparsify(
    model: keras.Model, sparsity: float = 0.5, *, begin_step: int = 0, end_step: int
) -> Any:
    """A ``tf_keras`` model whose smallest weights become zero while it is trained.

    Fit it with `sparsity_callback`. Like clusters, zeros save bytes only in a compressed file.

    Args:
        model: a built Keras 3 model without gates, trained.
        sparsity: fraction of zeros in each kernel at the end, in (0, 1).
        begin_step: training step at which zeros begin to appear.
        end_step: step at which the fraction is reached.

    Returns:
        A model with the weights of ``model``, to be compiled and fitted with ``tf_keras``.

    Raises:
        InvalidArgumentError: if the fraction or the steps make no sense.
        UnsupportedModelError: if the model cannot be translated.
        ExportError: if the extra is not installed.

    References:
        Zhu & Gupta 2017, "To prune, or not to prune", section 3.

    Examples:
        >>> import tf_kfacprune as kp
        >>> trainee = kp.tfmot.sparsify(small, 0.5, end_step=1000)  # doctest: +SKIP
    """
    if not isinstance(sparsity, float) or not 0.0 < sparsity < 1.0:
        raise InvalidArgumentError(
            f"sparsity must be a fraction in (0, 1). Received: sparsity={sparsity!r}."
        )
    if not 0 <= begin_step < end_step:
        raise InvalidArgumentError(
            "begin_step must not be negative and end_step must be later. Received: "
            f"begin_step={begin_step!r}, end_step={end_step!r}."
        )
    tools = legacy_packages().tfmot.sparsity.keras
    schedule = tools.PolynomialDecay(
        0.0, sparsity, begin_step, end_step, frequency=_frequency(end_step - begin_step)
    )
    return _wrapped(model, 2, lambda layer: tools.prune_low_magnitude(layer, schedule))


def sparsity_callback() -> Any:
    """The ``tf_keras`` callback that `sparsify` models need in ``fit``.

    Returns:
        A callback.

    Raises:
        ExportError: if the extra is not installed.
    """
    return legacy_packages().tfmot.sparsity.keras.UpdatePruningStep()


def copy_back(trained: Any, model: keras.Model) -> keras.Model:
    """Copies the weights of a trained ``tf_keras`` model into the Keras 3 model it was made of.

    From there every way of `export` is open.

    Args:
        trained: what `to_tf_keras`, `cluster` or `sparsify` made of ``model``, trained.
        model: the Keras 3 model, which is changed.

    Returns:
        ``model``.

    Raises:
        InvalidArgumentError: if ``trained`` was not made of ``model``.
    """
    if not is_legacy_model(trained):
        raise InvalidArgumentError(
            f"trained must be a tf_keras model. Received: {type(trained).__name__}."
        )
    tools = legacy_packages().tfmot
    stripped = tools.sparsity.keras.strip_pruning(tools.clustering.keras.strip_clustering(trained))
    found = {layer.name: layer for layer in stripped.layers}
    pairs = []
    for call, name in zip(trace(model).calls, layer_names(model), strict=True):
        if not call.is_layer or not call.operation.weights:
            continue
        if name not in found:
            raise InvalidArgumentError(
                f"trained has no layer {name!r}: it was not made of model {model.name!r} by "
                "to_tf_keras, cluster or sparsify. A quantization-aware model cannot be copied "
                "back: write it with kp.export.tflite(quantization='qat')."
            )
        if not isinstance(call.operation, keras.layers.Normalization):
            pairs += weights_by_role(call.operation, found[name])
    for variable, other in pairs:
        variable.assign(other.numpy())
    return model


def _frequency(steps: int) -> int:
    """Steps between two updates of the zeros: at least ten updates, one of them at the end."""
    longest = min(100, max(1, steps // 10))
    return next(every for every in range(longest, 0, -1) if steps % every == 0)


def _wrapped(model: Any, fewest: int, wrap: Any) -> Any:
    """The translated model with its larger kernels wrapped."""
    legacy = legacy_packages().keras
    translated = model if is_legacy_model(model) else to_tf_keras(model)
    kernels = {
        layer.name
        for layer in translated.layers
        if type(layer).__name__ in _CONTRACTIONS
        and max(int(weight.shape.num_elements()) for weight in layer.weights) >= fewest
    }

    def change(layer: Any) -> Any:
        return wrap(layer) if layer.name in kernels else layer

    return legacy.models.clone_model(translated, clone_function=change)
