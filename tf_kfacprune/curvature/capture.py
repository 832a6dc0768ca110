"""Runs a network and records, at every Kronecker block, its input and pre-activation.

The layers stay unmodified Keras layers. While the network runs, `call` and `activation` of the
layers in question are replaced by functions that record their argument, so the forward pass is
the layers' own, to the bit, whatever their options. Records live in a list of the caller, never
on the layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import keras

from tf_kfacprune.curvature.batch import mask_of
from tf_kfacprune.curvature.blocks import Record
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph.rules.substitution import substituted

__all__ = ["OfLayer", "capture"]

Network = Callable[..., Any]


class OfLayer(Protocol):
    """Anything about one layer: a Kronecker block, for example."""

    @property
    def layer(self) -> keras.layers.Layer:
        """The layer."""


# Whose mask each projection of an attention layer has.
_MASKED_AS = {"query": "query", "key": "key", "value": "value", "output": "query", "gate": "query"}


@contextmanager
def _noting_masks(attention: keras.layers.Layer, noted: dict[int, Any]) -> Iterator[None]:
    """Notes the masks of an attention layer for its projections, from which it hides them."""
    call: Any = attention.call
    signature = inspect.signature(call)

    def noting_call(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.setdefault("key", given.get("value"))
        given.setdefault("key_mask", given.get("value_mask"))
        for part, source in _MASKED_AS.items():
            mask = given.get(f"{source}_mask")
            mask = mask_of(given.get(source)) if mask is None else mask
            noted[id(getattr(attention, f"_{part}_dense", None))] = mask
        return call(*args, **kwargs)

    with substituted(attention, call=noting_call):
        yield


@contextmanager
def _recording(
    layer: keras.layers.Layer, records: list[Record], noted: dict[int, Any]
) -> Iterator[None]:
    """Appends a record of every call of a layer."""
    call: Any = layer.call
    activation: Any = getattr(layer, "activation", None)
    shown: list[Any] = []

    def recording_activation(s: Any) -> Any:
        shown.append(s)
        return activation(s)

    def recording_call(x: Any, *args: Any, **kwargs: Any) -> Any:
        shown.clear()
        outputs = call(x, *args, **kwargs)
        mask = layer.compute_mask(x, mask_of(x)) if layer.supports_masking else None
        mask = noted.get(id(layer)) if mask is None else mask
        records.append(Record(layer, x, shown[-1] if shown else outputs, mask))
        return outputs

    replaced: dict[str, Any] = {"call": recording_call}
    if activation is not None:
        replaced["activation"] = recording_activation
    with substituted(layer, **replaced):
        yield


def capture(
    network: Network,
    x: Any,
    blocks: Sequence[OfLayer],
    training: bool,
) -> tuple[Any, list[Record]]:
    """Runs a network and records every use of the layers of the given blocks.

    Args:
        network: The model; called as `network(x, training=training)`.
        x: Inputs in the structure of the model's inputs.
        blocks: Blocks to record, or whatever else has a layer.
        training: Whether layers run in training mode.

    Returns:
        The model's outputs and the records, in the order of the calls.

    Raises:
        UnsupportedModelError: If a layer was not met.
    """
    layers = {id(block.layer): block.layer for block in blocks}
    attentions = {id(a): a for b in blocks if (a := getattr(b, "attention", None)) is not None}
    records: list[Record] = []
    noted: dict[int, Any] = {}
    with ExitStack() as stack:
        for attention in attentions.values():
            stack.enter_context(_noting_masks(attention, noted))
        for layer in layers.values():
            stack.enter_context(_recording(layer, records, noted))
        outputs = network(x, training=training)
    missed = [layer.name for layer in layers.values() if all(r.layer is not layer for r in records)]
    if missed:
        raise UnsupportedModelError(
            f"Layers {sorted(missed)} were expected in the network but were not called. "
            "Expected: every layer with a Kronecker block is called in each forward pass, outside "
            "of any tf.function of its own. Call these layers directly in the model, or set "
            "`trainable = False` on those that it does not use."
        )
    return outputs, records
