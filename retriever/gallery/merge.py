"""Merge the segments of the index into one with a tree of its own; what a search finds stays the same.

Changes merge some segments by themselves, after they are published: when there are more than `MOST` changes the
neighbours that cost least, and everything when a quarter of the index has changed. So each picture is written a few
times in all, and there are never many files. This command merges everything at once, for instance before the folder is
copied.

In:  a `retriever.gallery.build` folder.
Out: the index's next version (retriever/gallery/publish.py), of one segment.
Command: python -m retriever.gallery.merge --index DIR
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.command_line.commands import run_command
from tools.command_line.failures import AGAIN
from tools.errors import BadInput
from tools.features import Rows
from tools.texts import plural

from .compact import BLOCK
from .gallery import Gallery, read_gallery, read_index_manifest, segments_of
from .options import IndexOptions
from .pictures import Gone, Picture
from .publish import holding, next_number, publish, shape_of
from .segments import Block, Segment, write_segment

MOST = 12  # changes that lie over the first segment
TOGETHER = 6  # of them that are merged when there are more
SHARE = 4  # everything is merged when the changes are more than one part in so many


@dataclass(frozen=True, kw_only=True)
class Config(IndexOptions):
    """Which index is merged."""


def tidy(folder: Path) -> None:
    """Merge what has come to cost more than it should. The folder is held.

    A failure leaves the index as it is, which is said, and nothing is lost.
    """
    try:
        while (found := due(list(segments_of(read_index_manifest(folder).facts).values()))) is not None:
            merge(read_gallery(folder), *found)
    except (BadInput, OSError, MemoryError) as error:  # too many open files, say
        reason = (str(error) or type(error).__name__).removesuffix(f", {AGAIN}")
        print(f"the change is made, but its segments were not merged: {reason}; the next change tries it again")


def due(weights: Sequence[int]) -> tuple[int, int] | None:
    """First and end of the segments to merge now; None while there are none.

    Args:
        weights: of a gallery's segments (`segments_of`).
    """
    if SHARE * sum(weights[1:]) > weights[0]:
        return 0, len(weights)
    if len(weights) <= 1 + MOST:
        return None
    sums = [sum(weights[start : start + TOGETHER]) for start in range(1, len(weights) - TOGETHER + 1)]
    start = 1 + int(np.argmin(sums))
    return start, start + TOGETHER


def merge(gallery: Gallery, start: int, end: int) -> None:
    """Publish a version in which one segment stands for those from `start` to before `end`.

    Args:
        gallery: what `holding` or `changing` gave, or a newer version of it.
    """
    merged = gallery.segments[start:end]
    first, last = merged[0].first, merged[-1].first + len(merged[-1])
    rows: Rows = np.arange(first, last)
    rows = rows[gallery.stays(rows)]
    shape = shape_of(gallery, len(rows))
    gone = still_gone(merged, {segment.number for segment in gallery.segments[:start]})
    files = write_segment(
        gallery.folder, next_number(gallery), shape, blocks(gallery, merged, rows), gone=gone, tree=start == 0
    )
    segments = list(segments_of(gallery.facts).items())
    segments[start:end] = [(files[0].parent.name, len(rows) + sum(len(each.rows) for each in gone))]
    publish(gallery, dict(segments), files, pictures=len(gallery), facts={})


def still_gone(merged: Sequence[Segment], before: set[int]) -> list[Gone]:
    """What merged segments remove of the segments before them.

    Args:
        before: numbers of these.
    """
    rows: dict[int, list[Rows]] = {}
    for gone in (gone for segment in merged for gone in segment.store.gone() if gone.segment in before):
        rows.setdefault(gone.segment, []).append(gone.rows)
    return [Gone(segment, np.unique(np.concatenate(own))) for segment, own in sorted(rows.items())]


def blocks(gallery: Gallery, segments: Sequence[Segment], rows: Rows) -> Iterator[Block]:
    """Rows of some segments, block by block."""
    pictures = (each for segment in segments for each in enumerate(segment.store.pictures(), start=segment.first))
    for start in range(0, len(rows), BLOCK):
        some = rows[start : start + BLOCK]
        features = gallery.stored_features(some) if gallery.keeps_features else None
        yield Block(gallery.read_codes(some), list(_picked(pictures, some)), features, gallery.read_contents(some))


def _picked(pictures: Iterator[tuple[int, Picture]], rows: Rows) -> Iterator[Picture]:
    """The pictures of some rows, which are ascending."""
    for row in rows.tolist():
        yield next(picture for own, picture in pictures if own == row)


def merge_all(index: Path) -> tuple[int, int]:
    """Merge all segments of an index. Returns how many there were, and the number of pictures."""
    with holding(index) as gallery:
        count = len(gallery.segments)
        if count > 1 or len(gallery.gone) or is_earlier(gallery):
            merge(gallery, 0, count)
        return count, len(gallery)


def is_earlier(gallery: Gallery) -> bool:
    """Whether an earlier program wrote the first segment."""
    return gallery.segments[0].name.startswith("version")


def main(config: Config) -> None:
    began = time.monotonic()
    segments, pictures = merge_all(config.index)
    seconds = time.monotonic() - began
    print(f"{plural(segments, 'segment')} merged, {plural(pictures, 'picture')} can be found, {seconds:.1f} s")


if __name__ == "__main__":
    run_command(main, Config)
