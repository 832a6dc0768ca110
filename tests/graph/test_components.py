from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tf_kfacprune.graph.components import connected_components


def union_find(size, pairs):
    parent = list(range(size))

    def find(node):
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in pairs:
        a, b = sorted((find(a), find(b)))
        parent[b] = a
    return [find(node) for node in range(size)]


@given(st.data(), st.integers(1, 30))
def test_components_equal_a_sequential_union_find(data, size):
    node = st.integers(0, size - 1)
    pairs = data.draw(st.lists(st.tuples(node, node), max_size=60))
    found = connected_components(size, np.array(pairs, int).reshape(-1, 2))
    assert found.tolist() == union_find(size, pairs)


def test_a_long_chain_is_one_component():
    chain = np.stack([np.arange(9999), np.arange(1, 10000)], 1)
    rng = np.random.default_rng(0)
    names = rng.permutation(10000)
    assert np.unique(connected_components(10000, names[chain])).tolist() == [0]
