"""Finds the Kronecker blocks of a network, and says why the rest has none."""

from __future__ import annotations

from dataclasses import dataclass, field

import keras

from tf_kfacprune.curvature.blocks import KroneckerBlock, blocks_of
from tf_kfacprune.curvature.blocks.registry import ATTENTION, no_rule
from tf_kfacprune.gates import GateAware, GateSource

__all__ = ["NetworkBlocks", "find_blocks"]

READS_GATES = "its channels are gated inside the layer"


@dataclass(frozen=True)
class NetworkBlocks:
    """The Kronecker blocks of a network.

    Attributes:
        blocks: The blocks, in the order in which the network lists its layers.
        reasons: Path of each weight that is in no block -> why.
        without_block: Name of each layer with weights, none of them in a block -> why.
    """

    blocks: list[KroneckerBlock] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    without_block: dict[str, str] = field(default_factory=dict)


def find_blocks(network: keras.Model, *, with_frozen: bool = False) -> NetworkBlocks:
    """Finds the blocks of all layers of a network: Functional, Sequential or subclassed.

    Nested models and layers of the user's own are searched for layers inside; layers of Keras
    that run others in a way of their own (RNN, TimeDistributed) are not.

    Args:
        network: A built model.
        with_frozen: Whether layers that are not trainable count, too.

    Returns:
        A `NetworkBlocks`.
    """
    found = NetworkBlocks()
    _search(network, found, set(), with_frozen)
    return found


def _search(
    layer: keras.layers.Layer, found: NetworkBlocks, seen: set[int], with_frozen: bool
) -> None:
    if id(layer) in seen or isinstance(layer, GateSource):
        return
    seen.add(id(layer))
    if isinstance(layer, GateAware):
        # Attention is gated around its projections, which do what they do without gates; in other
        # layers the gates change what the weights are multiplied by.
        inner = layer.gate_aware_of
        if isinstance(inner, ATTENTION):
            _search(inner, found, seen, with_frozen)
        else:
            _leave_out(layer, READS_GATES, found)
        return
    parts = _parts(layer)
    of_layer = blocks_of(layer, with_frozen=with_frozen)
    if of_layer.blocks or not parts or _is_of_keras(layer):
        if layer.weights:
            _add(layer, of_layer.blocks, of_layer.reasons, found)
        return
    inside = {id(v) for part in parts for v in part.weights}
    found.reasons.update({v.path: no_rule(layer) for v in layer.weights if id(v) not in inside})
    for part in parts:
        _search(part, found, seen, with_frozen)


def _parts(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    if isinstance(layer, keras.Model):
        return list(layer.layers)
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _is_of_keras(layer: keras.layers.Layer) -> bool:
    return type(layer).__module__.startswith("keras.") and not isinstance(layer, keras.Model)


def _add(
    layer: keras.layers.Layer,
    blocks: list[KroneckerBlock],
    reasons: dict[str, str],
    found: NetworkBlocks,
) -> None:
    found.blocks.extend(blocks)
    found.reasons.update(reasons)
    if not blocks:
        found.without_block[layer.name] = next(iter(reasons.values()), no_rule(layer))


def _leave_out(layer: keras.layers.Layer, reason: str, found: NetworkBlocks) -> None:
    found.reasons.update({v.path: reason for v in layer.weights})
    if layer.weights:
        found.without_block[layer.name] = reason
