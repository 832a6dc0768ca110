"""Connected components of label pairs, vectorized."""

from __future__ import annotations

import numpy as np

__all__ = ["connected_components"]


def connected_components(size: int, pairs: np.ndarray) -> np.ndarray:
    """Labels every node with the smallest node of its component.

    Alternates hooking (each root takes the smallest root it is paired with) and pointer jumping
    until nothing moves, which takes O(log size) rounds on the graphs met here.

    Args:
        size: Number of nodes.
        pairs: Integer array of shape `(num_pairs, 2)`: nodes that belong together.

    Returns:
        Integer array of shape `(size,)`: the smallest node of each node's component.
    """
    root = np.arange(size)
    left, right = pairs[:, 0], pairs[:, 1]
    while left.size:
        low = np.minimum(root[left], root[right])
        high = np.maximum(root[left], root[right])
        apart = low != high
        left, right = left[apart], right[apart]
        np.minimum.at(root, high[apart], low[apart])
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped
    return root
