"""An index with some pictures added and others removed, without building it anew: changed nodes lie over the tree.

The prefixes of all codes that came or went are the changed nodes. Each lists its children anew: those of the tree, with
changed ones in the place of their counterparts, those that are new, and not those behind which no picture is left. All
other nodes stay where they are in the tree, which is never written. A changed node's number lies behind those of the
tree's level. So a change costs what changed, and a search finds what it would find in an index built anew, equal scores
included.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..index import Children, Codes, DeviceLevel, Level, VokenIndex, build_index, spread

Numbers = NDArray[np.int64]
NONE = -1  # in the place of a node that the tree does not have


class Edges(NamedTuple):
    """The children of the changed nodes of one level, node by node, ascending codes within a node."""

    starts: Numbers
    """(changed + 1,) where each node's children begin"""
    codes: Numbers
    """(children,)"""
    nodes: Numbers
    """(children,) of the next level: of the tree, or changed ones behind them"""
    tree_nodes: int
    """Nodes that the tree has on this level."""


class Overlay(NamedTuple):
    """An index and what has changed; rows of added pictures are behind those of the index."""

    tree: VokenIndex
    levels: list[Edges]
    """Level by level; none where nothing has changed."""
    starts: Numbers
    """(changed leaves + 1,) where each one's pictures begin"""
    rows: Numbers
    """(pictures,) behind the changed leaves, ascending within a leaf"""

    def expand(self, leaves: Numbers) -> tuple[Numbers, Numbers]:
        """Pictures of leaves (any number,), in their order; as `VokenIndex.expand`."""
        changed = leaves >= self.tree.leaves
        rows, owners = self.tree.expand(leaves[~changed])
        owners = np.flatnonzero(~changed)[owners]
        own = leaves[changed] - self.tree.leaves
        places, which = spread(self.starts[own], self.starts[own + 1])
        owners = np.concatenate([owners, np.flatnonzero(changed)[which]])
        order = np.argsort(owners, kind="stable")
        return np.concatenate([rows, self.rows[places]])[order], owners[order]


def lay_over(index: VokenIndex, *, gone: tuple[Codes, Numbers], come: tuple[Codes, Numbers]) -> Overlay:
    """Lay changes over an index.

    Args:
        gone: codes (pictures, levels) and rows (pictures,) of pictures of the index that are removed.
        come: codes and rows of pictures that are added; their rows are behind the index's, and ascending.
    """
    codes = np.concatenate([gone[0], come[0]])
    if not len(codes):
        return Overlay(index, [], np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64))
    changed = build_index(codes)
    twins = counterparts(index, changed)
    starts, rows, live = leaf_rows(index, changed, twins[-1], gone[1], come[1], removed=len(gone[0]))
    levels = []
    for number in reversed(range(len(index.levels))):
        edges, live = children_anew(index.levels[number], changed.levels[number], twins[number], live)
        levels.append(edges)
    return Overlay(index, levels[::-1], starts, rows)


def counterparts(index: VokenIndex, changed: VokenIndex) -> list[Numbers]:
    """For each depth, the root's first, the tree's node of the same prefix as each changed node, or NONE."""
    found: list[Numbers] = [np.zeros(1, dtype=np.int64)]
    for level, own in zip(index.levels, changed.levels, strict=True):
        _, parents = spread(own.offsets.at(np.arange(len(found[-1]))), own.offsets.at(np.arange(len(found[-1])) + 1))
        found.append(find_children(level, found[-1][parents], own.codes.astype(np.int64)))
    return found


def find_children(level: Level, nodes: Numbers, codes: Numbers) -> Numbers:
    """The children of nodes (any number,), which may be NONE, that have codes (as many,); or NONE. A binary search."""
    known = nodes != NONE
    low = np.where(known, level.offsets.at(np.where(known, nodes, 0)), 0)
    end = np.where(known, level.offsets.at(np.where(known, nodes, 0) + 1), 0)
    high = end.copy()
    last = len(level.codes) - 1
    while (open_ := low < high).any():
        middle = (low + high) // 2
        below = open_ & (level.codes[middle.clip(max=last)] < codes)
        low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
    return np.where((low < end) & (level.codes[low.clip(max=last)] == codes), low, NONE)


def leaf_rows(
    index: VokenIndex, changed: VokenIndex, twins: Numbers, gone: Numbers, come: Numbers, *, removed: int
) -> tuple[Numbers, Numbers, NDArray[np.bool_]]:
    """Starts and rows of the pictures behind the changed leaves, and whether a leaf has any."""
    known = np.flatnonzero(twins != NONE)
    old, owners = index.expand(twins[known])
    stays = ~np.isin(old, gone)
    places, which = changed.expand(np.arange(changed.leaves))  # rows of the changes: the removed ones first
    added = places >= removed
    rows = np.concatenate([old[stays], come[places[added] - removed]])
    leaves = np.concatenate([known[owners[stays]], which[added]])
    order = np.lexsort((rows, leaves))
    counts = np.bincount(leaves, minlength=changed.leaves)
    return np.append(0, np.cumsum(counts)), rows[order], counts > 0


def children_anew(
    level: Level, changed: Level, twins: Numbers, live: NDArray[np.bool_]
) -> tuple[Edges, NDArray[np.bool_]]:
    """The children of the changed nodes of one level, and whether a node has any.

    Args:
        twins: (changed nodes,) the tree's node of each, or NONE.
        live: (changed nodes of the next level,) whether a picture lies behind it.
    """
    count, width = len(twins), 1 + int(max(level.codes.max(), changed.codes.max()))
    known = np.flatnonzero(twins != NONE)
    places, which = spread(level.offsets.at(twins[known]), level.offsets.at(twins[known] + 1))
    own_places, own = spread(changed.offsets.at(np.arange(count)), changed.offsets.at(np.arange(count) + 1))
    keys = known[which] * width + level.codes[places]
    own_keys = own * width + changed.codes[own_places]
    stays = ~np.isin(keys, own_keys)
    keys = np.concatenate([keys[stays], own_keys[live]])
    nodes = np.concatenate([places[stays], (own_places + len(level.codes))[live]])
    order = np.argsort(keys)
    keys, nodes = keys[order], nodes[order]
    counts = np.bincount(keys // width, minlength=count)
    return Edges(np.append(0, np.cumsum(counts)), keys % width, nodes, len(level.offsets.deltas) - 1), counts > 0


class OverlaidLevel(NamedTuple):
    """One level on the model's device."""

    tree: DeviceLevel
    tree_nodes: int
    starts: Tensor
    codes: Tensor
    nodes: Tensor
    widest: int

    @property
    def in_order(self) -> bool:
        """Changed nodes have the largest numbers, whatever their codes."""
        return False

    def children(self, nodes: Tensor) -> Children:
        """The children of nodes (any shape)."""
        changed = nodes >= self.tree_nodes
        own, other = (nodes - self.tree_nodes).clamp_min(0), nodes.masked_fill(changed, 0)
        first = torch.where(changed, self.starts[own], self.tree.first_child(other))
        counts = torch.where(changed, self.starts[own + 1], self.tree.first_child(other + 1)) - first
        width = self.widest if nodes.is_cuda else int(counts.max())
        steps = torch.arange(width, device=nodes.device)
        places = first.unsqueeze(-1) + steps
        in_tree, in_own = places.clamp_max(len(self.tree.codes) - 1), places.clamp_max(len(self.codes) - 1)
        changed = changed.unsqueeze(-1)
        codes = torch.where(changed, self.codes[in_own], self.tree.codes[in_tree].long())
        found = torch.where(changed, self.nodes[in_own], in_tree)
        return Children(found, codes, steps < counts.unsqueeze(-1))


def overlay_to_device(overlay: Overlay, tree: list[DeviceLevel]) -> list[OverlaidLevel] | list[DeviceLevel]:
    """What a search walks; the tree's own levels (`to_device`) where nothing has changed."""
    if not overlay.levels:
        return tree
    device = tree[0].codes.device
    return [
        OverlaidLevel(
            tree=level,
            tree_nodes=edges.tree_nodes if number else 0,  # a search begins at node 0: the changed root
            starts=torch.from_numpy(edges.starts).to(device),
            codes=torch.from_numpy(np.append(edges.codes, 0)).to(device),  # 0: filling, where there are none
            nodes=torch.from_numpy(np.append(edges.nodes, 0)).to(device),
            widest=max(level.widest, int(np.diff(edges.starts).max())),
        )
        for number, (level, edges) in enumerate(zip(tree, overlay.levels, strict=True))
    ]
