"""Runs a traced network and records, at every Kronecker block, its input and pre-activation.

The layers stay unmodified Keras layers. While a layer is being called its `activation` attribute
is replaced by one that first records its argument, so the forward pass is the layer's own, to
the bit, whatever its options. Records live in a list of the caller, never on the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from tf_kfacprune.curvature.blocks import KroneckerBlock
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph import Graph

__all__ = ["Record", "capture", "kronecker_factors", "per_example_gradients"]


@dataclass(frozen=True)
class Record:
    """One use of a layer in one forward pass.

    Attributes:
        block: The Kronecker block of the layer.
        x: Input of the layer.
        s: Pre-activation, shape `(batch, ..., n_out)`.
    """

    block: KroneckerBlock
    x: Any
    s: Any


@contextmanager
def _recording_activation(layer: keras.layers.Layer, recorded: list[Any]) -> Iterator[None]:
    """Hands the pre-activation of the next call of `layer` to `recorded`."""
    activation = layer.activation

    def recording(s: Any) -> Any:
        recorded.append(s)
        return activation(s)

    # Past Keras' attribute tracking, which is locked once a layer is built.
    layer.__dict__["activation"] = recording
    try:
        yield
    finally:
        layer.__dict__["activation"] = activation


def capture(
    graph: Graph,
    x: Any,
    blocks: Sequence[KroneckerBlock],
    training: bool,
) -> tuple[Any, list[Record]]:
    """Runs a network and records every use of the given blocks.

    Args:
        graph: The traced network.
        x: Inputs in the structure of the model's inputs.
        blocks: Blocks to record.
        training: Whether layers run in training mode.

    Returns:
        The model's outputs and the records, in the order of the calls.

    Raises:
        UnsupportedModelError: If a block was not met or did not show its pre-activation.
    """
    by_layer: Mapping[int, KroneckerBlock] = {id(block.layer): block for block in blocks}
    records: list[Record] = []

    def call_operation(call: Any, args: Any, kwargs: Any) -> Any:
        block = by_layer.get(id(call.operation))
        if block is None:
            return call.operation(*args, **kwargs)
        recorded: list[Any] = []
        with _recording_activation(block.layer, recorded):
            outputs = call.operation(*args, **kwargs)
        records.extend(Record(block, args[0], s) for s in recorded)
        return outputs

    outputs = graph.run(x, call_operation, training=training)
    missed = {b.name for b in blocks} - {r.block.name for r in records}
    if missed:
        raise UnsupportedModelError(
            f"Layers {sorted(missed)} were expected in the network but showed no pre-activation. "
            "Expected: every Kronecker block is called once per forward pass, outside of any "
            "tf.function of its own. Call these layers directly in the model."
        )
    return outputs, records


def per_example_gradients(
    graph: Graph,
    x: Any,
    blocks: Sequence[KroneckerBlock],
    mean_loss: Callable[[Any], Any],
    training: bool,
) -> tuple[list[Record], list[Any]]:
    """Gradients of each example's own loss with respect to its pre-activations.

    Args:
        graph: The traced network.
        x: Inputs in the structure of the model's inputs.
        blocks: Blocks to record.
        mean_loss: Maps the model's outputs to the loss averaged over the batch.
        training: Whether layers run in training mode.

    Returns:
        The records, and for each the gradients g, shaped like the pre-activation, float32.
    """
    with tf.GradientTape() as tape:
        outputs, records = capture(graph, x, blocks, training)
        # The loss is a mean over the batch; g belongs to the example. Scaled before, not after
        # differentiation, small gradients survive in half precision.
        batch = tf.shape(records[0].s)[0] if records else 1
        loss = mean_loss(outputs)
        summed_loss = loss * tf.cast(batch, loss.dtype)
    gradients = tape.gradient(
        summed_loss,
        [record.s for record in records],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return records, [tf.cast(g, tf.float32) for g in gradients]


def kronecker_factors(
    blocks: Sequence[KroneckerBlock], records: Sequence[Record], gradients: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Factors (A, G) of each block; uses of a shared layer count as locations.

    Args:
        blocks: The blocks, in the order of the result.
        records: Uses of the blocks in one forward pass.
        gradients: Per-example gradients, one per record.

    Returns:
        For each block `(A, G)` of shapes `(n_a, n_a)` and `(n_out, n_out)`, float32.
    """
    factors = []
    for block in blocks:
        uses = [(r, g) for r, g in zip(records, gradients, strict=True) if r.block is block]
        a = tf.add_n([tf.convert_to_tensor(block.factor_a(r.x)) for r, _ in uses])
        g = tf.add_n([tf.convert_to_tensor(block.factor_g(g)) for _, g in uses]) / len(uses)
        factors.append((a, g))
    return factors
