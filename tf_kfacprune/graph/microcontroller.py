"""Which layers TensorFlow Lite Micro cannot run, and which were never held against it.

Layers in `_CONFIRMED` are those of networks whose predicted flash and RAM were held against the
runtime (tests/graph/test_board.py, docs/budgets.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import keras

from tf_kfacprune.graph.channel_graph import ChannelGraph
from tf_kfacprune.graph.file_bytes import is_plain_relu
from tf_kfacprune.graph.int8_operations import is_known_activation

__all__ = ["lacking_on_micro", "unconfirmed_on_micro", "warn_of_unconfirmed"]

_CONFIRMED = {
    *("Activation", "Add", "AveragePooling1D", "AveragePooling2D", "BatchNormalization"),
    *("Concatenate", "Conv1D", "Conv1DTranspose", "Conv2D", "Conv2DTranspose", "Cropping1D"),
    *("Dense", "DepthwiseConv1D", "DepthwiseConv2D", "Dropout", "ELU", "Flatten"),
    *("GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalMaxPooling1D"),
    *("GlobalMaxPooling2D", "GroupNormalization", "InputLayer", "LayerNormalization", "LeakyReLU"),
    *("MaxPooling1D", "MaxPooling2D", "PReLU", "Permute", "RMSNormalization", "ReLU", "Reshape"),
    *("Rescaling", "SeparableConv1D", "SeparableConv2D", "Softmax", "SpatialDropout1D"),
    *("SpatialDropout2D", "UpSampling2D", "ZeroPadding1D", "ZeroPadding2D"),
}
_SHOWN = 5  # longer lists are cut


def _layers(channels: ChannelGraph) -> Iterator[keras.Layer]:
    """The layers of the model, each once, without gates."""
    for operation in dict.fromkeys(call.operation for call in channels.graph.calls):
        own = type(operation).__module__.startswith("tf_kfacprune.")
        if isinstance(operation, keras.Layer) and not own:
            yield operation


def _activation(layer: keras.Layer) -> str:
    return getattr(getattr(layer, "activation", None), "__name__", "linear")


def _operator_lacking(layer: keras.Layer) -> str | None:
    """What a layer becomes that the runtime has no kernel for, and what would do instead."""
    if _activation(layer) == "gelu":
        return "GELU; activation='silu' needs none"
    return None


def lacking_on_micro(channels: ChannelGraph) -> tuple[str, ...]:
    """Layers whose operations TensorFlow Lite Micro has no kernel for, each with the operation.

    Args:
        channels: The channel graph.
    """
    lacking = ((layer, _operator_lacking(layer)) for layer in _layers(channels))
    return tuple(f"{layer.name!r} ({operator})" for layer, operator in lacking if operator)


def unconfirmed_on_micro(channels: ChannelGraph) -> tuple[tuple[str, str], ...]:
    """Layers whose predicted flash and RAM were never held against the runtime.

    Args:
        channels: The channel graph.

    Returns:
        Their names, each with its class or activation function.
    """
    found = []
    for layer in _layers(channels):
        kind, activation = type(layer).__name__, _activation(layer)
        if kind not in _CONFIRMED:
            found.append((layer.name, kind))
        elif isinstance(layer, keras.layers.ReLU) and not is_plain_relu(layer):
            found.append((layer.name, "ReLU with a slope, threshold or ceiling"))
        elif not is_known_activation(activation) and _operator_lacking(layer) is None:
            found.append((layer.name, f"activation {activation}"))
    return tuple(found)


def warn_of_unconfirmed(channels: ChannelGraph, measures: Iterable[str], name: str) -> None:
    """Warns of a budget of flash or RAM on layers that the runtime lacks, or was not asked about.

    Args:
        channels: The channel graph of the gated network.
        measures: The measures that the budget bounds.
        name: Name of the model.
    """
    bounded = " and ".join(measure for measure in measures if measure in ("flash", "ram"))
    if not bounded:
        return
    if lacking := lacking_on_micro(channels):
        warnings.warn(
            f"TensorFlow Lite Micro will not run model {name!r}: it has no kernel for what becomes "
            f"of {_listed(lacking)}.",
            stacklevel=4,
        )
    if unconfirmed := unconfirmed_on_micro(channels):
        described = tuple(f"{layer!r} ({what})" for layer, what in unconfirmed)
        warnings.warn(
            f"What these layers of {name!r} take on a microcontroller was not confirmed on its "
            f"runtime: {_listed(described)}. The file may exceed the budget of {bounded}: hold "
            "it to the budget with kp.export.check_micro, and ask for less if it does.",
            stacklevel=4,
        )


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
