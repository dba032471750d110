"""Connected components of an edge list, label = smallest member: in memory, and the two steps of a round on parts.

The rounds are the alternating algorithm of Kiveris et al. (2014, "Connected components in MapReduce and beyond").
A large-star joins every neighbour above a node to the smallest of its neighbourhood, a small-star every neighbour below
it; both keep the components. Repeated to the fixed point they leave one star per component, its centre the smallest
member. `star_round` needs only the whole neighbourhood of each node it is given, so a distributed driver calls it on
one partition of the nodes at a time.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def union_find(edges: np.ndarray, n: int) -> np.ndarray:
    """Labels int64 (n,) of nodes 0 .. n-1: the smallest node of the component. `edges`: int64 (e, 2)."""
    edges = _edge_array(edges)
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    smallest = np.full(component.max(initial=-1) + 1, n, np.int64)
    np.minimum.at(smallest, component, np.arange(n))
    return smallest[component]


def star_edges(edges: np.ndarray) -> np.ndarray:
    """The same components as stars: sorted int64 (e', 2) of (smallest member, other member), at most one per member.

    Node ids may be any integers; the memory grows with the edges, not with the ids.
    """
    edges = _edge_array(edges)
    nodes, index = np.unique(edges, return_inverse=True)
    labels = union_find(index.reshape(-1, 2), len(nodes))
    member = labels != np.arange(len(nodes))
    stars = np.stack([nodes[labels[member]], nodes[member]], axis=1)
    return stars[np.lexsort((stars[:, 1], stars[:, 0]))]


def distinct(edges: np.ndarray) -> np.ndarray:
    """The rows of int64 (e, 2) sorted, each once; several times faster than `np.unique` of rows."""
    edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
    new = np.ones(len(edges), bool)
    new[1:] = (edges[1:] != edges[:-1]).any(axis=1)
    return edges[new]


def both_ways(edges: np.ndarray) -> np.ndarray:
    """Every edge from either end, without loops: the neighbourhoods that a large-star needs."""
    edges = edges[edges[:, 0] != edges[:, 1]]
    return np.concatenate([edges, edges[:, ::-1]])


def downward(edges: np.ndarray) -> np.ndarray:
    """Every edge once, from its larger end, without loops: the neighbourhoods that a small-star needs."""
    edges = edges[edges[:, 0] != edges[:, 1]]
    return np.stack([edges.max(axis=1), edges.min(axis=1)], axis=1)


def star_round(neighbours: np.ndarray, large: bool) -> np.ndarray:
    """A large-star or small-star on some of the nodes.

    Args:
      neighbours: int64 (e, 2) of (node, neighbour), from `both_ways` (large) or `downward` (small), holding all of the
        pairs of each node that it has any of. large: which of the two.

    Returns:
      distinct int64 (e', 2) edges as (smaller, larger). Those of several partitions may repeat one another.
    """
    if not len(neighbours):
        return np.zeros((0, 2), np.int64)
    pairs = neighbours[np.argsort(neighbours[:, 0], kind="stable")]
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=pairs[0, 0] - 1))
    nodes = pairs[starts, 0]
    lowest = np.minimum(np.minimum.reduceat(pairs[:, 1], starts), nodes)
    centre = np.repeat(lowest, np.diff(starts, append=len(pairs)))
    if large:
        above = pairs[:, 1] > pairs[:, 0]
        made = np.stack([centre[above], pairs[above, 1]], axis=1)
    else:
        made = np.concatenate([np.stack([centre, pairs[:, 1]], axis=1), np.stack([lowest, nodes], axis=1)])
    return distinct(made[made[:, 0] != made[:, 1]])


def _edge_array(edges: np.ndarray) -> np.ndarray:
    return np.asarray(edges, np.int64).reshape(-1, 2)
