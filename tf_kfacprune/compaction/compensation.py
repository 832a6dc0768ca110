"""Compensated removal: readers absorb what the kept channels predict of the removed ones.

The mathematics is in `readers`; here the data pass through the network. The second moment of what
a layer reads is taken over the network as it was before channels went: closed gates are opened,
gates in between keep their values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from tf_kfacprune.compaction.plan import RemovalPlan
from tf_kfacprune.compaction.readers import LayerCompensation, Reader, find_readers
from tf_kfacprune.errors import DataError
from tf_kfacprune.gates import GateBank, GatedNetwork, GateSource
from tf_kfacprune.graph import Call

__all__ = ["Compensation", "compensate", "warn_of_skipped"]


@dataclass(frozen=True)
class Compensation:
    """What compensation did, layer by layer.

    Attributes:
        layers: The layers that were compensated.
        skipped: Layers that lost input channels without compensation, with the reason.
        examples: Number of examples that were looked at.
    """

    layers: tuple[LayerCompensation, ...]
    skipped: dict[str, str]
    examples: int

    def __str__(self) -> str:
        lines = [f"Compensation from {self.examples} examples: error of pre-activations"]
        lines += [
            f"  {x.layer}: {x.removed} of {x.removed + x.kept} inputs removed, "
            f"{x.before:.3g} -> {x.after:.3g}"
            for x in self.layers
        ]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.skipped.items())])


def compensate(
    model: Any, compact_model: keras.Model, data: Any, batch_size: int = 64
) -> Compensation:
    """Changes the weights of a compact model in place so that they make up for what is missing.

    What `compact(model, compensate=True, data=data)` does at its end, with a report.

    Args:
        model: What `compact` was given, in the same state: a `PrunableModel` or a Keras model that
            contains gates.
        compact_model: The compact model.
        data: Inputs in the structure of the model's inputs, or a `tf.data.Dataset` of batches
            `x` or `(x, y)`.
        batch_size: Number of examples per batch, if `data` holds arrays.

    Returns:
        What was done, and what was not.

    Raises:
        DataError: If `data` holds no example.

    Examples:
        >>> small = kp.compact(gated)
        >>> print(kp.compensate(gated, small, x_train[:512]))

    References:
        Hassibi & Stork 1993, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon".
    """
    gated = model.gated if hasattr(model, "gated") else GatedNetwork(model)
    if gated is None:  # a PrunableModel without a budget: nothing was removed
        return Compensation((), {}, 0)
    plan = RemovalPlan(gated.net, gated)
    compact_layers = {layer.name: layer for layer in compact_model.layers}
    readers, skipped = find_readers(plan, compact_layers)
    examples = _accumulate(gated, readers, data, batch_size)
    done = tuple(reader.absorb(compact_layers[reader.layer.name]) for reader in readers)
    return Compensation(done, skipped, examples)


def warn_of_skipped(report: Compensation) -> None:
    """One warning that names all layers that were not compensated."""
    if report.skipped:
        listed = "; ".join(f"{name!r}: {why}" for name, why in report.skipped.items())
        warnings.warn(
            f"Layers that lost input channels without compensation: {listed}.", stacklevel=3
        )


def _accumulate(gated: GatedNetwork, readers: Sequence[Reader], data: Any, batch_size: int) -> int:
    """Runs the network with its closed gates open and collects what the readers read."""
    by_call = {reader.call: reader for reader in readers}

    def call_operation(call: Call, args: Any, kwargs: Any) -> Any:
        if isinstance(call.operation, GateSource):
            return _with_closed_gates_open(call, args, kwargs)
        if call in by_call:
            given = zip(tree.flatten(call.args), tree.flatten(args), strict=True)
            by_call[call].observe(next(x for value, x in given if value is call.inputs[0]))
        return call.execute(args, kwargs)

    examples = 0
    for x in _batches(data, batch_size):
        examples += len(tree.flatten(x)[0])
        gated.graph.run(x, call_operation, training=False)
    if not examples:
        raise DataError("Argument `data` of compact holds no example. Expected: at least one.")
    return examples


def _with_closed_gates_open(call: Call, args: Any, kwargs: Any) -> Any:
    source = call.operation
    values = source.deterministic_values()
    opened = ops.where(values > 0, values, ops.ones_like(values))
    if isinstance(source, GateBank):
        return opened, ops.ones_like(opened)
    x = tree.flatten((args, kwargs))[0]
    shape = [-1 if k == source.axis % len(x.shape) else 1 for k in range(len(x.shape))]
    return x * ops.cast(ops.reshape(opened, shape), x.dtype)


def _batches(data: Any, batch_size: int) -> Iterator[Any]:
    if hasattr(data, "element_spec"):  # a tf.data.Dataset
        for element in data:
            yield element[0] if isinstance(element, tuple) else element
        return
    lengths = set()
    for part in tree.flatten(data):
        if not len(getattr(part, "shape", ())):
            raise DataError(
                "Argument `data` of compact must be arrays in the structure of the model's inputs, "
                f"or a tf.data.Dataset. Received: data with {part!r} in it"
            )
        lengths.add(len(part))
    if len(lengths) != 1:
        raise DataError(
            "Argument `data` of compact must hold equally many examples of every input. Received: "
            f"{sorted(lengths)}"
        )
    for start in range(0, lengths.pop(), batch_size):
        part = slice(start, start + batch_size)
        yield tree.map_structure(lambda array, s=part: np.asarray(array[s]), data)
