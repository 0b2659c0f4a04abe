"""The tree of retriever/index.py built on disk, for more codes than are sorted in memory: an external sort.

The codes are read three times, block by block: once for the largest code, once to count how many pictures begin with
each prefix. The counts divide the prefixes into runs of neighbours, the partitions, each small enough to be sorted in
memory. The third time appends every picture to the file of its partition. The partitions are then sorted one by one, in
their order, and what each adds to the arrays is appended to their files. The files are those of
`save_index(build_index(codes))`, bit for bit.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tools.files import read_array, replacing

from ..index import (
    BASES,
    BLOCK_BITS,
    CODES,
    DELTAS,
    LEAF_BASES,
    LEAF_DELTAS,
    LEAF_REPEATS,
    MOST_PICTURES,
    PICTURES,
    Codes,
    are_few,
    build_index,
    save_index,
    smallest_type,
)

MOST_IN_MEMORY = 1 << 26  # pictures: sorting these takes about 6 GB
PARTITION = 1 << 24  # pictures that are sorted at once: about 1 GB
READ = 1 << 22  # pictures that are read at once
MOST_PARTITIONS = 512  # files that are open at once
KEY_BITS = 63
PREFIX_BITS = 24  # of a key, by which pictures are divided: the first two of four codes below 4,096


class Partition(NamedTuple):
    """Neighbours in the order of codes."""

    keys: Path
    """int64: a picture's codes, one behind the other in `bits` bits each"""
    rows: Path
    """int32: its row"""


def write_index(folder: Path, codes: Codes) -> None:
    """Write the tree over codes (pictures, levels) into a folder, sorted in memory while there are few enough."""
    if len(codes) <= MOST_IN_MEMORY:
        save_index(folder, build_index(codes))
    else:
        write_large_index(folder, codes)


def write_large_index(folder: Path, codes: Codes, *, partition: int = PARTITION) -> None:
    """Write the tree over codes (pictures, levels) into a folder, as `save_index` does, in bounded memory.

    Args:
        folder: needs the space of the index and, for a while, another 12 bytes a picture.
        codes: any array, for instance a memory-mapped one; of at least one picture.
        partition: pictures that are sorted at once, as far as pictures that share a prefix allow.

    Raises:
        ValueError: there are no codes, or more than an index holds, or they do not fit into 63 bits.
        BadInput: the disk is full.
    """
    if codes.ndim != 2 or not codes.size:
        raise ValueError(f"expected codes (pictures, levels) of at least one picture, got {codes.shape}")
    if len(codes) > MOST_PICTURES:
        raise ValueError(f"{len(codes)} pictures, an index holds {MOST_PICTURES} at most")
    bits = max(1, max(int(block.max()) for _, block in blocks(codes)).bit_length())
    if bits * codes.shape[1] > KEY_BITS:
        raise ValueError(f"{codes.shape[1]} codes of {bits} bits do not fit into {KEY_BITS} bits")
    with tempfile.TemporaryDirectory(prefix=".sorting-", dir=folder) as temporary:
        tree = TreeFiles(folder, levels=codes.shape[1], bits=bits)
        for part in divide(codes, bits, Path(temporary), partition):
            tree.append(*sorted_keys(part))
            part.keys.unlink()
            part.rows.unlink()
        tree.close()


def blocks(codes: Codes) -> Iterator[tuple[int, Codes]]:
    """Blocks of rows, each with the row at which it begins."""
    return ((start, codes[start : start + READ]) for start in range(0, len(codes), READ))


def keys_of(codes: Codes, bits: int) -> NDArray[np.int64]:
    """Numbers (pictures,) in the order of codes (pictures, levels): these in `bits` bits each."""
    keys = codes[:, 0].astype(np.int64)
    for level in range(1, codes.shape[1]):
        keys <<= bits
        keys |= codes[:, level]
    return keys


def divide(codes: Codes, bits: int, folder: Path, partition: int) -> list[Partition]:
    """Spread the pictures over the files of partitions, in which they stand in the order of rows."""
    shift = max(0, bits * codes.shape[1] - PREFIX_BITS)
    counts = np.zeros(1 << min(PREFIX_BITS, bits * codes.shape[1]), dtype=np.int64)
    for _, block in blocks(codes):
        counts += np.bincount(keys_of(block, bits) >> shift, minlength=len(counts))
    before = np.cumsum(counts) - counts
    wanted = max(partition, -(-len(codes) // MOST_PARTITIONS))
    runs = before // wanted
    owner = np.cumsum(np.diff(runs, prepend=runs[:1]) > 0, dtype=np.uint16)  # of each prefix: its partition
    parts = [Partition(folder / f"{number}.keys", folder / f"{number}.rows") for number in range(int(owner.max()) + 1)]
    files = [(part.keys.open("wb"), part.rows.open("wb")) for part in parts]
    try:
        for start, block in blocks(codes):
            keys = keys_of(block, bits)
            owners = owner[keys >> shift]
            order = np.argsort(owners, kind="stable")  # a radix sort
            ends = np.cumsum(np.bincount(owners, minlength=len(parts)))
            keys, rows = keys[order], (order + start).astype(np.int32)
            for number, (keys_file, rows_file) in enumerate(files):
                own = slice(int(ends[number - 1]) if number else 0, int(ends[number]))
                keys_file.write(keys[own].data)
                rows_file.write(rows[own].data)
    finally:
        for pair in files:
            for file in pair:
                file.close()
    return [part for part in parts if part.keys.stat().st_size]


def sorted_keys(part: Partition) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Keys (pictures,) of a partition in ascending order, and their rows; equal keys keep the order of rows."""
    keys, rows = np.fromfile(part.keys, dtype=np.int64), np.fromfile(part.rows, dtype=np.int32)
    first = keys.min()
    keys -= first
    place_bits = max(1, (len(keys) - 1).bit_length())
    if int(keys.max()).bit_length() + place_bits > KEY_BITS:
        order = np.argsort(keys, kind="stable")
        return keys[order] + first, rows[order]
    packed = (keys << place_bits) | np.arange(len(keys))  # a key and its place: no two are equal, so any sort is stable
    packed.sort()
    return (packed >> place_bits) + first, rows[packed & ((1 << place_bits) - 1)]


class TreeFiles:
    """The files of the tree, to which sorted codes are appended."""

    def __init__(self, folder: Path, *, levels: int, bits: int) -> None:
        self.levels, self.bits, self.folder = levels, bits, folder
        small = np.int16 if bits < 16 else np.int32
        self.codes = [ArrayFile(folder / CODES.format(level), small) for level in range(levels)]
        self.offsets = [
            OffsetsFile(folder / BASES.format(level), folder / DELTAS.format(level)) for level in range(levels)
        ]
        self.leaves = OffsetsFile(folder / LEAF_BASES, folder / LEAF_DELTAS)
        self.repeats = ArrayFile(folder / LEAF_REPEATS, np.int32)
        self.pictures = ArrayFile(folder / PICTURES, np.int32)
        self.last: int | None = None

    def append(self, keys: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
        """Add pictures whose keys (pictures,) are ascending and none is below those that were added before."""
        mask = (1 << self.bits) - 1
        nodes = np.array([self.last is None])  # whether a row begins a node of the level; first the root
        nodes = np.append(nodes, np.zeros(len(keys) - 1, dtype=bool))
        leaves = self.codes[-1].length
        for level in range(self.levels):
            prefix = keys >> (self.bits * (self.levels - 1 - level))
            fresh = np.empty(len(keys), dtype=bool)
            fresh[0] = self.last is None or prefix[0] != self.last >> (self.bits * (self.levels - 1 - level))
            np.not_equal(prefix[1:], prefix[:-1], out=fresh[1:])
            children = np.cumsum(fresh, dtype=np.int32)
            self.offsets[level].append(children[nodes].astype(np.int64) + (self.codes[level].length - 1))
            self.codes[level].append(prefix[fresh] & mask)
            nodes = fresh
        self.leaves.append(np.flatnonzero(nodes) + self.pictures.length)
        self.repeats.append(children[~nodes].astype(np.int64) + (leaves - 1))
        self.pictures.append(rows)
        self.last = int(keys[-1])

    def close(self) -> None:
        """Finish the files."""
        for offsets, codes in zip(self.offsets, self.codes, strict=True):
            offsets.append(np.array([codes.length]))
            offsets.close()
            codes.close()
        few = are_few(self.repeats.length, self.leaves.length)
        self.leaves.append(np.array([self.pictures.length]))
        self.leaves.close(keep=not few)
        self.repeats.close(keep=few and self.repeats.length > 0)
        self.pictures.close()


class ArrayFile:
    """A `.npy` file of one dimension that grows."""

    def __init__(self, path: Path, kind: Any) -> None:
        self.path, self.kind, self.length = path, np.dtype(kind), 0
        self.file: BinaryIO = path.open("wb")
        self._header()

    def append(self, values: NDArray[np.integer]) -> None:
        self.file.write(np.ascontiguousarray(values.astype(self.kind, copy=False)).data)
        self.length += len(values)

    def close(self, *, keep: bool = True) -> None:
        """Write how many there are into the header, which has room for it; or remove the file."""
        self.file.seek(0)
        self._header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if not keep:
            self.path.unlink()

    def _header(self) -> None:
        npy.write_array_header_1_0(
            self.file, {"descr": npy.dtype_to_descr(self.kind), "fortran_order": False, "shape": (self.length,)}
        )


class OffsetsFile:
    """Files of `Offsets` to which rising numbers are appended."""

    def __init__(self, bases: Path, deltas: Path) -> None:
        self.bases, self.deltas = ArrayFile(bases, np.int32), ArrayFile(deltas, np.uint8)
        self.base, self.length = 0, 0

    def append(self, numbers: NDArray[np.int64]) -> None:
        """Add numbers (any count,), each at least one above the one before."""
        if not len(numbers):
            return
        places = np.arange(self.length, self.length + len(numbers))
        excess = numbers - places
        begin = places & ((1 << BLOCK_BITS) - 1) == 0  # of a block
        bases = np.append(self.base, excess[begin])
        deltas = excess - bases[np.cumsum(begin)]
        self.bases.append(bases[1:])
        needed = smallest_type(int(deltas.max()))
        if needed.itemsize > self.deltas.kind.itemsize:
            self.deltas = widened(self.deltas, needed)
        self.deltas.append(deltas)
        self.base, self.length = int(bases[-1]), self.length + len(numbers)

    def close(self, *, keep: bool = True) -> None:
        for file in (self.bases, self.deltas):
            file.close(keep=keep)


def widened(narrow: ArrayFile, kind: "np.dtype[Any]") -> ArrayFile:
    """The same numbers in a wider type."""
    narrow.close()
    old = read_array(narrow.path)
    with replacing(narrow.path) as temporary:
        wide = ArrayFile(temporary, kind)
        for start in range(0, len(old), READ):
            wide.append(old[start : start + READ])
        wide.file.flush()
    wide.path = narrow.path
    return wide
