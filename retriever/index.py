"""The index: all pictures' codes as a prefix tree in flat arrays, what a search may write and the pictures behind it.

Nodes of a level are numbered in the order of their prefixes, so a smaller node has the smaller codes. A node's children
lie next to each other: one level is `offsets` (nodes + 1,), where each node's children begin, and `codes` (children,),
the code of each; the child at position p of a level is node p of the next. The nodes behind the last level are leaves,
and a leaf expands to the pictures that have its codes.

A node costs 2 bytes for its code (4 for codebooks above 32,768) and, above the last level, 1 or 2 for where its
children begin (`Offsets`). The map to pictures is 4 bytes a picture. Where pictures share codes it also has 1 byte a
leaf, or 4 for each picture behind another one with its codes, whichever is less.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.errors import BadInput
from tools.files import read_array, write_array

Codes = NDArray[np.integer]
Ints = NDArray[np.int32]

MOST_PICTURES = 2**31 - 1  # nodes and pictures are counted in int32
BLOCK_BITS = 6  # 64 offsets share a base
WIDEST_BLOCK = 1 << 20  # nodes whose children are counted at once
CODES, BASES, DELTAS = "level{}_codes.npy", "level{}_bases.npy", "level{}_deltas.npy"
PICTURES, LEAF_BASES, LEAF_DELTAS = "pictures.npy", "leaf_bases.npy", "leaf_deltas.npy"
LEAF_REPEATS = "leaf_repeats.npy"


class Offsets(NamedTuple):
    """A rising sequence in which each number is at least one above the one before, in 1 or 2 bytes per number.

    Number i is i + bases[i >> 6] + deltas[i]: what lies above the smallest such sequence, and that relative to the
    start of a block of 64.
    """

    bases: Ints
    """(blocks,)"""
    deltas: NDArray[np.integer]
    """(numbers,) uint8, int16 or int32, whichever is enough"""

    @property
    def nbytes(self) -> int:
        return self.bases.nbytes + self.deltas.nbytes

    def at(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """The numbers at positions (any shape)."""
        wide = np.asarray(positions, dtype=np.int64)
        return wide + self.bases[wide >> BLOCK_BITS] + self.deltas[wide]


def pack_offsets(numbers: Ints) -> Offsets:
    """Pack numbers (any count,) of which each is at least one above the one before."""
    excess: Ints = np.subtract(numbers, np.arange(len(numbers), dtype=np.int32), dtype=np.int32)
    bases = excess[:: 1 << BLOCK_BITS].copy()
    deltas = excess - np.repeat(bases, 1 << BLOCK_BITS)[: len(excess)]
    return Offsets(bases, deltas.astype(smallest_type(int(deltas.max()))))


class Repeats(NamedTuple):
    """Where the pictures of each leaf begin, if few leaves have more than one."""

    leaves: Ints
    """(pictures - leaves,) ascending: a leaf as often as it has pictures behind its first"""

    @property
    def nbytes(self) -> int:
        return self.leaves.nbytes

    def at(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where the pictures of the leaves at positions (any shape) begin."""
        wide = np.asarray(positions, dtype=np.int64)
        return wide + np.searchsorted(self.leaves, wide.astype(np.int32))  # of another type, the leaves would be copied


def are_few(repeats: int, leaves: int) -> bool:
    """Whether `Repeats` take fewer bytes than `Offsets`."""
    return 4 * repeats < leaves


def smallest_type(most: int) -> "np.dtype[np.integer]":
    """Of the deltas' types the smallest that holds a number."""
    return np.dtype(np.uint8 if most < 2**8 else np.int16 if most < 2**15 else np.int32)


def spread(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All numbers from each start to before its end, and which start (its position) each belongs to."""
    counts = ends - starts
    which = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[which] + within, which


class Level(NamedTuple):
    """The edges from one level of nodes to the next."""

    offsets: Offsets
    """(nodes + 1) of them"""
    codes: Codes
    """(children,) ascending within a node"""

    @property
    def widest(self) -> int:
        """Largest number of children of a node."""
        starts = range(0, len(self.offsets.deltas) - 1, WIDEST_BLOCK)
        ends = (min(start + WIDEST_BLOCK, len(self.offsets.deltas) - 1) for start in starts)
        return max(
            int(np.diff(self.offsets.at(np.arange(start, end + 1))).max())
            for start, end in zip(starts, ends, strict=True)
        )


class VokenIndex(NamedTuple):
    """Prefix tree over the codes of at least one picture; in memory, or memory-mapped."""

    levels: list[Level]
    pictures: Ints
    """(pictures,) rows of the pool grouped by leaf, ascending within a leaf: the order inside a collision"""
    leaf_offsets: Offsets | Repeats | None
    """(leaves + 1) of them, where a leaf's pictures begin in `pictures`; None where each leaf has one"""

    @property
    def leaves(self) -> int:
        return len(self.levels[-1].codes)

    @property
    def constraint_bytes(self) -> int:
        """Bytes of the tree that a search walks."""
        return sum(level.offsets.nbytes + level.codes.nbytes for level in self.levels)

    @property
    def map_bytes(self) -> int:
        """Bytes of the map from leaves to pictures."""
        return self.pictures.nbytes + (0 if self.leaf_offsets is None else self.leaf_offsets.nbytes)

    def expand(self, leaves: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pictures of leaves (any number,), in their order.

        Returns:
            rows: (pictures,) rows of the pool.
            owners: (pictures,) position in `leaves` that each comes from.
        """
        if self.leaf_offsets is None:
            return self.pictures[leaves].astype(np.int64), np.arange(len(leaves))
        first = self.leaf_offsets.at(leaves)
        places, owners = spread(first, self.leaf_offsets.at(leaves + 1))
        return self.pictures[places].astype(np.int64), owners


def build_index(codes: Codes) -> VokenIndex:
    """Build the tree over codes (pictures, levels) of at least one picture; repeated rows share a leaf."""
    if codes.ndim != 2 or not codes.size:
        raise ValueError(f"expected codes (pictures, levels) of at least one picture, got {codes.shape}")
    if len(codes) > MOST_PICTURES:
        raise ValueError(f"{len(codes)} pictures, an index holds {MOST_PICTURES} at most")
    order = sort_codes(codes)
    return build_sorted(codes[order], order)


def sort_codes(codes: Codes) -> NDArray[np.int64]:
    """Rows (pictures,) of codes (pictures, levels) in ascending order; equal codes keep the order of their rows."""
    bits = max(1, int(codes.max()).bit_length())
    if bits * codes.shape[1] > 63:
        return np.lexsort(codes.T[::-1])
    keys: NDArray[np.int64] = np.zeros(len(codes), dtype=np.int64)
    for level in range(codes.shape[1]):
        keys = (keys << bits) | codes[:, level]
    return np.argsort(keys, kind="stable")


def build_sorted(codes: Codes, pictures: NDArray[np.integer]) -> VokenIndex:
    """Build the tree over codes (pictures, levels) that are already in ascending order.

    Args:
        pictures: (pictures,) the pool row that each row of `codes` belongs to.
    """
    small = np.int16 if int(codes.max()) < 2**15 else np.int32
    fresh = np.zeros(len(codes), dtype=bool)  # whether a row's prefix differs from that of the row before
    fresh[0] = True
    starts: Ints = np.zeros(1, dtype=np.int32)  # the row at which each node of the level begins; first the root's
    levels = []
    for level in range(codes.shape[1]):
        column = np.ascontiguousarray(codes[:, level])
        fresh[1:] |= column[1:] != column[:-1]
        below = np.flatnonzero(fresh).astype(np.int32)
        ranks = np.cumsum(fresh, dtype=np.int32)  # of each row's node among the level's
        offsets = np.append(ranks[starts] - 1, np.int32(len(below)))
        levels.append(Level(pack_offsets(offsets), column[below].astype(small)))
        starts = below
    leaf_offsets: Offsets | Repeats | None = None
    if are_few(len(codes) - len(starts), len(starts)):
        repeats = ranks[~fresh] - 1
        leaf_offsets = Repeats(repeats) if len(repeats) else None
    else:
        leaf_offsets = pack_offsets(np.append(starts, np.int32(len(codes))))
    return VokenIndex(levels, pictures.astype(np.int32), leaf_offsets)


def save_index(folder: Path, index: VokenIndex) -> None:
    """Write the arrays into a folder, one `.npy` file each."""
    for number, level in enumerate(index.levels):
        write_array(folder / CODES.format(number), level.codes)
        write_array(folder / BASES.format(number), level.offsets.bases)
        write_array(folder / DELTAS.format(number), level.offsets.deltas)
    write_array(folder / PICTURES, index.pictures)
    if isinstance(index.leaf_offsets, Repeats):
        write_array(folder / LEAF_REPEATS, index.leaf_offsets.leaves)
    elif index.leaf_offsets is not None:
        write_array(folder / LEAF_BASES, index.leaf_offsets.bases)
        write_array(folder / LEAF_DELTAS, index.leaf_offsets.deltas)


def load_index(folder: Path, levels: int) -> VokenIndex:
    """Memory-map what `save_index` wrote: milliseconds at any size.

    Raises:
        BadInput: a file is missing or damaged, or the arrays do not fit together.
    """
    found = [
        Level(
            Offsets(read_array(folder / BASES.format(number)), read_array(folder / DELTAS.format(number))),
            read_array(folder / CODES.format(number)),
        )
        for number in range(levels)
    ]
    leaf_offsets: Offsets | Repeats | None = None
    if (folder / LEAF_REPEATS).is_file():
        leaf_offsets = Repeats(read_array(folder / LEAF_REPEATS))
    elif (folder / LEAF_BASES).is_file():
        leaf_offsets = Offsets(read_array(folder / LEAF_BASES), read_array(folder / LEAF_DELTAS))
    index = VokenIndex(found, read_array(folder / PICTURES), leaf_offsets)
    nodes = 1
    for number, level in enumerate(found):
        _check_offsets(folder, f"level {number}", level.offsets, nodes, len(level.codes))
        nodes = len(level.codes)
    if isinstance(leaf_offsets, Offsets):
        _check_offsets(folder, "the leaves", leaf_offsets, nodes, len(index.pictures))
    elif not _fit(leaf_offsets, nodes, len(index.pictures)):
        raise BadInput(f"{folder}: {nodes} leaves, {len(index.pictures)} pictures: build the index again")
    return index


def _check_offsets(folder: Path, name: str, offsets: Offsets, nodes: int, children: int) -> None:
    """Whether the offsets of one level cut `children` into `nodes` parts."""
    blocks = (nodes >> BLOCK_BITS) + 1
    if (len(offsets.deltas), len(offsets.bases)) != (nodes + 1, blocks) or offsets.at(np.array(nodes)) != children:
        raise BadInput(f"{folder}: the arrays of {name} do not fit its neighbours': build the index again")


def _fit(repeats: Repeats | None, leaves: int, pictures: int) -> bool:
    """Whether the leaves, with their repeats, are as many as the pictures."""
    if repeats is None:
        return leaves == pictures
    last = repeats.leaves[-1:]
    return leaves + len(repeats.leaves) == pictures and bool((last < leaves).all())


class Children(NamedTuple):
    """Children of nodes, filled up to the number of the widest."""

    nodes: Tensor
    """(..., width) int64 of the next level"""
    codes: Tensor
    """(..., width) int64"""
    exist: Tensor
    """(..., width) bool; the others are filling"""


class DeviceLevel(NamedTuple):
    """One level on the model's device."""

    bases: Tensor
    deltas: Tensor
    codes: Tensor
    widest: int

    def first_child(self, nodes: Tensor) -> Tensor:
        """Where the children of nodes (any shape) begin."""
        return nodes + self.bases[nodes >> BLOCK_BITS] + self.deltas[nodes]

    @property
    def in_order(self) -> bool:
        """Whether a smaller node always has the smaller codes."""
        return True

    def children(self, nodes: Tensor) -> Children:
        """The children of nodes (any shape)."""
        first = self.first_child(nodes)
        counts = self.first_child(nodes + 1) - first
        width = self.widest if nodes.is_cuda else int(counts.max())  # on a GPU, asking would wait for it
        steps = torch.arange(width, device=nodes.device)
        places = (first.unsqueeze(-1) + steps).clamp_max(len(self.codes) - 1)
        return Children(places, self.codes[places].long(), steps < counts.unsqueeze(-1))


class SearchLevel(Protocol):
    """What a search needs to know of one level."""

    @property
    def in_order(self) -> bool:
        """Whether a smaller node always has the smaller codes."""

    def children(self, nodes: Tensor) -> Children:
        """The children of nodes (any shape)."""


class Leaves(Protocol):
    """What is needed to make pictures of the leaves that a search found."""

    def expand(self, leaves: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows (pictures,) behind leaves (any number,), and the position in `leaves` that each comes from."""


def to_device(index: VokenIndex, device: torch.device) -> list[DeviceLevel]:
    """Copy the tree to a device, once; what `beam_search` walks."""
    return [
        DeviceLevel(
            _as_tensor(level.offsets.bases, device),
            _as_tensor(level.offsets.deltas, device),
            _as_tensor(level.codes, device),
            level.widest,
        )
        for level in index.levels
    ]


def _as_tensor(array: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else np.array(array)).to(device)
