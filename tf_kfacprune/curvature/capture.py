"""Runs a network and records, at every Kronecker block, its input and pre-activation.

The layers stay unmodified Keras layers. While the network runs, `call` and `activation` of the
layers in question are replaced by functions that record their argument, so the forward pass is
the layers' own, to the bit, whatever their options. Records live in a list of the caller, never
on the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import keras
import tensorflow as tf

from tf_kfacprune.curvature.blocks import KroneckerBlock, Record
from tf_kfacprune.errors import UnsupportedModelError
from tf_kfacprune.graph.rules.substitution import substituted

__all__ = ["capture", "of_examples", "per_example_gradients", "probe_gradients"]

Network = Callable[..., Any]


class OfLayer(Protocol):
    """Anything about one layer: a Kronecker block, for example."""

    @property
    def layer(self) -> keras.layers.Layer:
        """The layer."""


@contextmanager
def _recording(layer: keras.layers.Layer, records: list[Record]) -> Iterator[None]:
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
        records.append(Record(layer, x, shown[-1] if shown else outputs))
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
    records: list[Record] = []
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(_recording(layer, records))
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


def probe_gradients(
    network: Network,
    x: Any,
    blocks: Sequence[KroneckerBlock],
    mean_losses: Callable[[Any], Sequence[Any]],
    training: bool,
) -> tuple[list[Record], list[list[Any]]]:
    """Gradients of each example's own losses with respect to its pre-activations.

    Args:
        network: The model; called as `network(x, training=training)`.
        x: Inputs in the structure of the model's inputs.
        blocks: Blocks to record.
        mean_losses: Maps the model's outputs to one or more losses, averaged over the batch.
        training: Whether layers run in training mode.

    Returns:
        The records, and for each loss one gradient g per record, shaped like the pre-activation,
        float32.
    """
    with tf.GradientTape(persistent=True) as tape:
        outputs, records = capture(network, x, blocks, training)
        # A loss is a mean over the batch; g belongs to the example. Scaled before, not after
        # differentiation, small gradients survive in half precision.
        batch = tf.shape(keras.tree.flatten(x)[0])[0]
        summed = [loss * tf.cast(batch, loss.dtype) for loss in mean_losses(outputs)]
    points = [record.s for record in records]
    probes = []
    for loss in summed:
        found = tape.gradient(loss, points, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        probes.append([tf.cast(g, tf.float32) for g in found])
    return records, probes


def of_examples(values: Any, tensor: Any) -> Any:
    """One value per example, shaped to be multiplied with a tensor of examples.

    Args:
        values: Shape `(batch,)`.
        tensor: Shape `(batch, ...)`, or `(batch * k, ...)` with k rows in a row per example.

    Returns:
        Shape `(batch, 1, ...)` or `(batch * k, 1, ...)`.
    """
    rows = tf.shape(tensor)[0]
    repeated = tf.repeat(values, rows // tf.shape(values)[0])
    return tf.reshape(repeated, [rows, *[1] * (len(tensor.shape) - 1)])


def per_example_gradients(
    network: Network,
    x: Any,
    blocks: Sequence[KroneckerBlock],
    mean_loss: Callable[[Any], Any],
    training: bool,
) -> tuple[list[Record], list[Any]]:
    """`probe_gradients` of a single loss: the records, and one gradient per record."""
    records, (gradients,) = probe_gradients(
        network, x, blocks, lambda outputs: [mean_loss(outputs)], training
    )
    return records, gradients
