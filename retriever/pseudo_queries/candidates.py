"""Candidates for pseudo queries: texts with two-tower features; the captions of similar train pictures."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tools.features import Floats, Rows, normalized
from tools.runs import Manifest

from ..data import Queries

if TYPE_CHECKING:
    from models.clip import TextEncoder

COMPARE_BLOCK = 256  # pictures that are compared with the train pictures at a time


class Pool(NamedTuple):
    """What may be read: all pictures, and of the captions those of train alone."""

    ids: list[str]
    """Of all pictures."""
    every_file: list[Path]
    """Of all pictures."""
    chosen: Rows
    """Pool rows of the pictures that get pseudo queries."""
    train: Queries
    images: Floats
    """(pictures, width)"""
    texts: Floats
    """(captions, width) of all splits, as they lie in the file: only the train captions' rows are read."""
    features: Manifest

    @property
    def files(self) -> list[Path]:
        """Picture files of the chosen rows."""
        return [self.every_file[row] for row in self.chosen]


class Candidates(NamedTuple):
    """Texts for one picture, to choose from."""

    texts: list[str]
    features: Floats
    """(texts, width)"""


class TrainCaptions:
    """Captions of the train pictures, found by how near these are to another picture."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.captions: dict[int, list[int]] = defaultdict(list)
        for position, picture in enumerate(pool.train.pictures.tolist()):
            self.captions[picture].append(position)
        self.rows = np.array(sorted(self.captions), dtype=np.int64)
        self.directions = normalized(pool.images[self.rows])

    def nearest(self, pictures: Rows, count: int) -> Iterator[Rows]:
        """For each of `pictures` the rows of the nearest others that are captioned, the nearest first."""
        if not len(self.rows):
            yield from (self.rows for _ in pictures)
            return
        count = min(count, len(self.rows))
        for start in range(0, len(pictures), COMPARE_BLOCK):
            block = pictures[start : start + COMPARE_BLOCK]
            cosines = normalized(self.pool.images[block]) @ self.directions.T
            cosines[block[:, None] == self.rows] = -np.inf  # a picture is no neighbour of its own
            for line, near in zip(cosines, np.argpartition(-cosines, count - 1, axis=1)[:, :count], strict=True):
                order = near[np.lexsort((near, -line[near]))]
                yield self.rows[order[np.isfinite(line[order])]]

    def texts(self, picture: int) -> list[str]:
        """Captions of one train picture."""
        return [self.pool.train.texts[position] for position in self.captions[picture]]

    def candidates(self, pictures: Rows, neighbours: int) -> Iterator[Candidates]:
        """For each of `pictures` the captions of its neighbours."""
        train = self.pool.train
        for near in self.nearest(pictures, neighbours):
            positions = [position for picture in near.tolist() for position in self.captions[picture]]
            texts = [train.texts[position] for position in positions]
            yield Candidates(texts, self.pool.texts[train.captions[positions]])


def with_features(written: Sequence[list[str]], encoder: "TextEncoder") -> Iterator[Candidates]:
    """The texts that were written for each picture, with their features."""
    texts = [text for of_picture in written for text in of_picture]
    found = encoder.encode(texts).cpu().numpy() if texts else np.zeros((0, 0), np.float32)
    ends = np.cumsum([len(of_picture) for of_picture in written])
    for of_picture, end in zip(written, ends, strict=True):
        yield Candidates(of_picture, found[end - len(of_picture) : end])
