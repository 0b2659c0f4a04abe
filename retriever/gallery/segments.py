"""Segments: the immutable parts of a gallery. Each holds some pictures, and names pictures of others that it removes.

segment-000007/
    codes.npy         (pictures, levels), in the order of rows
    features.npy      the pictures' normalised features, where they are kept: (pictures, width) float16, or
                      (pictures, parts) uint8 with centroids.npy in the first segment (retriever/gallery/compact.py)
    pictures.sqlite   ids, files, what the files held, and the removed rows (retriever/gallery/pictures.py)
    the arrays of the tree (retriever/index.py), in the first segment alone

A segment is written under another name, forced to the disk, and renamed: there is none that is not whole.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.command_line.failures import why_not_written
from tools.errors import BadInput
from tools.files import force_to_disk, new_array, read_array, write_array

from ..index import Codes, VokenIndex, load_index
from .compact import Codec, Stored
from .contents import Contents
from .large_index import write_index
from .pictures import STORE, Gone, LineStore, Picture, SqliteStore, Store, write_store

CODES, FEATURES, CODEC = "codes.npy", "features.npy", "centroids.npy"
SEGMENT = "segment-{:06d}"
NAMES = re.compile(  # of segments, also of unfinished ones
    r"\.?(segment|version)-\d{6,}"  # versions: whole galleries of an earlier program, each of which is one segment
)
AGAIN = "build the index again"


class Block(NamedTuple):
    """Some pictures, in the order of rows."""

    codes: Codes
    """(pictures, levels)"""
    pictures: Sequence[Picture]
    features: Stored | None
    """(pictures, width or parts) of `stored_features`; None where none are kept"""
    contents: Contents
    """(pictures,)"""


class Shape(NamedTuple):
    """What the blocks of a segment add up to."""

    pictures: int
    levels: int
    kind: Any
    """Type of the codes."""
    width: int | None
    """Numbers of a picture's stored features; None where none are kept."""
    codec: Codec | None
    """Of the features; None where they are halves, or none are kept."""


def shape_of_all(block: Block, codec: Codec | None = None) -> Shape:
    """Of a segment that is one block."""
    return Shape(len(block.codes), block.codes.shape[1], kind_of(block.codes), _width(block.features), codec)


def kind_of(codes: Codes) -> Any:
    """The smallest type that holds codes (at least one picture, levels)."""
    return np.int16 if int(codes.max()) < 2**15 else np.int32


def _width(features: Stored | None) -> int | None:
    return None if features is None else features.shape[1]


@dataclass(frozen=True)
class Segment:
    """One segment, memory-mapped. Rows are counted within it."""

    name: str
    first: int
    """Row of the gallery that its first picture has."""
    codes: Codes
    """(pictures, levels)"""
    features: Stored | None
    """(pictures, width or parts)"""
    store: Store
    codec: Codec | None
    """Of the whole gallery's features; None of all segments but the first, and where they are halves."""
    index: VokenIndex | None
    """The tree over all its codes, removed ones included; None of all segments but the first."""

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def number(self) -> int:
        return number_of(self.name)


def number_of(name: str) -> int:
    """
    >>> number_of("segment-000007")
    7
    """
    return int(name.rpartition("-")[2])


def write_segment(
    folder: Path, number: int, shape: Shape, blocks: Iterator[Block], *, gone: Sequence[Gone] = (), tree: bool = False
) -> list[Path]:
    """Write one segment, complete or not at all, which no manifest names yet. Returns its files.

    Args:
        folder: of the gallery.
        blocks: all pictures, of which one block at a time is in memory.
        gone: pictures of earlier segments that are removed.
        tree: whether to write the tree.

    Raises:
        BadInput: the disk is full.
    """
    segment = folder / SEGMENT.format(number)
    temporary = segment.with_name(f".{segment.name}")
    try:
        temporary.mkdir()
        codes = new_array(temporary / CODES, dtype=shape.kind, shape=(shape.pictures, shape.levels))
        features = None
        if shape.width is not None:
            stored_as = np.float16 if shape.codec is None else np.uint8
            features = new_array(temporary / FEATURES, dtype=stored_as, shape=(shape.pictures, shape.width))
        write_store(temporary / STORE, _placed(blocks, codes, features), gone=gone)
        if tree:
            write_index(temporary, codes)
            if shape.codec is not None:
                write_array(temporary / CODEC, shape.codec.centroids)
        del codes, features  # which writes what was still in memory
        for path in sorted(temporary.iterdir()):
            force_to_disk(path)
        force_to_disk(temporary)
        temporary.rename(segment)
        force_to_disk(folder)
    except OSError as error:
        if reason := why_not_written(error):
            raise BadInput(f"{segment} cannot be written: {reason}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(segment.iterdir())


def _placed(blocks: Iterator[Block], codes: Codes, features: Stored | None) -> Iterator[tuple[Picture, Contents]]:
    """The blocks' pictures one by one; their codes and features go into the arrays."""
    start = 0
    for block in blocks:
        end = start + len(block.codes)
        codes[start:end] = block.codes
        if features is not None:
            features[start:end] = block.features
        yield from zip(block.pictures, block.contents, strict=True)
        start = end
    assert start == len(codes), f"{start} pictures, {len(codes)} were announced"


def read_segment(folder: Path, name: str, *, first: int, levels: int, keeps_features: bool) -> Segment:
    """Open one segment: milliseconds at any size.

    Args:
        folder: of the gallery.
        first: row of its first picture; the segment that begins at 0 has the tree.

    Raises:
        BadInput: a file is missing or damaged, or the files do not fit together.
    """
    place = folder / name
    codes = read_array(place / CODES)
    store = _read_lines(place) if (place / LineStore.TEXT).exists() else SqliteStore(place / STORE)
    features = read_array(place / FEATURES) if keeps_features else None
    index = load_index(place, levels) if first == 0 else None
    codec = Codec(read_array(place / CODEC)) if first == 0 and (place / CODEC).is_file() else None
    counts = {STORE: len(store), "the tree": len(codes) if index is None else len(index.pictures)}
    if features is not None:
        counts[FEATURES] = len(features)
    for part, count in counts.items():
        if count != len(codes):
            raise BadInput(f"{place}: {part} has {count} rows for {len(codes)} pictures: {AGAIN}")
    return Segment(name, first, codes, features, store, codec, index)


def _read_lines(place: Path) -> LineStore:
    lines = read_array(place / LineStore.LINES)
    contents = read_array(place / LineStore.CONTENTS) if (place / LineStore.CONTENTS).is_file() else None
    try:
        text = np.memmap(place / LineStore.TEXT, dtype=np.uint8, mode="r")
    except ValueError:
        raise BadInput(f"{place / LineStore.TEXT} is empty: {AGAIN}") from None
    if lines[-1] != len(text) or (contents is not None and len(contents) != len(lines) - 1):
        raise BadInput(f"{place}: the files of its pictures do not fit together: {AGAIN}")
    return LineStore(text, lines, contents)
