"""The set of existing codes as a prefix tree in flat arrays: what a search may write, and the pictures behind it.

Nodes of a level are numbered in the order of their prefixes. A node's children lie next to each other, so one level
is two arrays: `offsets` (nodes + 1,), where a node's children begin, and `codes` (children,), the code of each; the
child at position p of a level is node p of the next level.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Level(NamedTuple):
    """The edges from one level of nodes to the next."""

    offsets: Ints
    """(nodes + 1,)"""
    codes: Ints
    """(children,) ascending within a node"""


class Trie(NamedTuple):
    """Prefix tree over codes (pictures, levels); its leaves expand to pictures."""

    levels: list[Level]
    leaf_offsets: Ints
    """(leaves + 1,) where a leaf's pictures begin in `pictures`"""
    pictures: Ints
    """(pictures,) rows of the pool grouped by leaf, ascending within a leaf: the order inside a collision"""
    widest: list[int]
    """largest number of children of a node, for each level"""

    def pictures_of(self, leaf: int) -> Ints:
        """Rows of the pictures that share a leaf's codes, in ascending order."""
        return self.pictures[self.leaf_offsets[leaf] : self.leaf_offsets[leaf + 1]]


def build_trie(codes: NDArray[np.integer]) -> Trie:
    """Build the tree over codes (pictures, levels), at least one picture; repeated rows share a leaf."""
    if codes.ndim != 2 or not codes.size:
        raise ValueError(f"expected codes (pictures, levels) of at least one picture, got {codes.shape}")
    order = np.lexsort(codes.T[::-1])  # stable: equal codes keep the order of their rows
    ordered = codes[order].astype(np.int64)
    fresh = np.zeros(len(ordered), dtype=bool)  # whether a row's prefix differs from the row before
    fresh[0] = True
    parents = np.zeros(len(ordered), dtype=np.int64)
    levels = []
    for level in range(ordered.shape[1]):
        fresh[1:] |= ordered[1:, level] != ordered[:-1, level]
        counts = np.bincount(parents[fresh], minlength=int(parents[-1]) + 1)
        levels.append(Level(np.concatenate([[0], np.cumsum(counts)]), ordered[fresh, level]))
        parents = np.cumsum(fresh) - 1
    leaf_offsets = np.concatenate([np.flatnonzero(fresh), [len(ordered)]])
    return Trie(levels, leaf_offsets, order, [int(np.diff(level.offsets).max()) for level in levels])
