"""Weights that no call of a model reads.

An embedding for masked patches that only pre-training uses, say. They are part of the model and of
`count_params`, but not of what it computes: the gated and the compact model do without them, and no
cost counts them.
"""

from __future__ import annotations

import keras

from tf_kfacprune.graph.tracer import Graph

__all__ = ["unread_weights"]


def unread_weights(graph: Graph) -> list[keras.Variable]:
    """The weights of a traced model that none of its calls reads, in the order of the model.

    Args:
        graph: The graph.

    Returns:
        The weights.
    """
    layers = [call.operation for call in graph.calls if call.is_layer]
    read = {id(weight) for layer in layers for weight in layer.weights}
    return [weight for weight in graph.model.weights if id(weight) not in read]
