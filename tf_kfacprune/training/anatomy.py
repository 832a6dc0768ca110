"""What a `PrunableModel` knows about its network and about what it was compiled with.

Plain objects on purpose: Keras would track the layers in them a second time.
"""

from __future__ import annotations

from typing import Any

import keras

from tf_kfacprune.curvature import KroneckerBlock, block_for, sampled_likelihood
from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.graph import Graph

__all__ = ["Anatomy", "Compiled", "inner_optimizer"]


class Anatomy:
    """What the model knows about its network."""

    def __init__(self, graph: Graph, gated: GatedNetwork | None) -> None:
        self.graph = graph
        self.gated = gated
        self.blocks: list[KroneckerBlock] = []
        self.without_block: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        seen: set[int] = set()
        for call in graph.calls:
            layer = call.operation
            if not isinstance(layer, keras.Layer) or not layer.weights or id(layer) in seen:
                continue
            seen.add(id(layer))
            block = block_for(layer)
            if isinstance(block, str):
                self.without_block[layer.name] = block
                self.reasons.update({variable.path: block for variable in layer.weights})
            else:
                self.blocks.append(block)


class Compiled:
    """What `compile` was told, digested: the likelihood of the loss, the kind of learning rate."""

    def __init__(self, loss: Any, optimizer: keras.optimizers.Optimizer) -> None:
        several = isinstance(loss, (list, tuple, dict))
        found: Any = "several losses" if several else sampled_likelihood(loss)
        self.sampled = None if isinstance(found, str) else found
        self.reason = found if isinstance(found, str) else None
        # Keras serializes a schedule as a dictionary, a constant as a number.
        self.constant_learning_rate = isinstance(optimizer.get_config()["learning_rate"], float)


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that takes the steps, inside of a loss-scaling one or not."""
    return getattr(optimizer, "inner_optimizer", optimizer)
