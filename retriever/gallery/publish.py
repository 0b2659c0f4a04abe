"""Changes of a gallery: how they become its current version, and outlive a kill or a power cut at any moment.

A change writes a segment, forces it to the disk, and replaces the manifest in one step; then all segments go but those
of the new manifest and of the one before it, which readers may still open. Writers hold the folder's lock, and remove
what a killed one left. When many segments have come together, they are merged (retriever/gallery/merge.py).
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from tools import runs
from tools.features import Rows

from .gallery import EARLIER, FOLDERS, SEGMENTS, Folder, Gallery, read_gallery, read_index_manifest, segments_of
from .pictures import Gone
from .segments import NAMES, Block, Shape, kind_of, number_of, write_segment

VERSION = "version-{:06d}"
HISTORY = 100  # changes that the manifest remembers


@contextmanager
def changing(folder: Path) -> Iterator[Gallery]:
    """Hold the folder for a change, and remove what a killed change left. Afterwards segments may be merged.

    Raises:
        BadInput: the folder is not finished, or another process changes it.
    """
    from .merge import tidy  # which changes galleries as others do

    with holding(folder) as gallery:
        yield gallery
        tidy(folder)


@contextmanager
def holding(folder: Path) -> Iterator[Gallery]:
    """The same without the merging."""
    if not (folder / runs.MANIFEST).is_file():
        read_index_manifest(folder)  # which says what to do
    with runs.hold(folder):
        gallery = read_gallery(folder)
        sweep(folder, gallery.facts)
        yield gallery


def replace_pictures(
    gallery: Gallery,
    *,
    removed: Rows,
    added: Block | None,
    source: str,
    folders: Sequence[Folder] = (),
) -> int:
    """Publish a version without the rows `removed` and with pictures behind those that stay.

    Args:
        gallery: what `changing` gave.
        source: where the change comes from, for the manifest's history.
        folders: that the pictures were taken from.

    Returns:
        The number of pictures in the new version.
    """
    removed = np.unique(removed)
    count = 0 if added is None else len(added.codes)
    blocks = iter([] if added is None else [added])
    files = write_segment(
        gallery.folder, next_number(gallery), shape_of(gallery, count, added), blocks, gone=gone_in(gallery, removed)
    )
    total = len(gallery) + count - len(removed)
    places = list(dict.fromkeys([*gallery.folders, *folders]))
    change = entry(added=count, removed=len(removed), source=source)
    facts = {
        FOLDERS: [each._asdict() for each in places],
        "history": [*gallery.facts["history"], change][-HISTORY:],
    }
    segments = {**segments_of(gallery.facts), files[0].parent.name: count + len(removed)}
    publish(gallery, segments, files, pictures=total, facts=facts)
    return total


def next_number(gallery: Gallery) -> int:
    """Number of the segment, and of the version, that comes next."""
    return number_of(gallery.facts["version"]) + 1


def shape_of(gallery: Gallery, pictures: int, added: Block | None = None) -> Shape:
    """Of a segment of a gallery, whose codes are those of other segments or of new pictures."""
    first = gallery.segments[0]
    width = None if first.features is None else first.features.shape[1]
    kinds = [segment.codes.dtype for segment in gallery.segments] + ([] if added is None else [kind_of(added.codes)])
    return Shape(pictures, first.codes.shape[1], np.result_type(*kinds), width, first.codec)


def gone_in(gallery: Gallery, rows: Rows) -> list[Gone]:
    """Rows as a segment names them."""
    return [Gone(segment.number, own) for segment, own, _ in gallery.by_segment(rows)]


def publish(
    gallery: Gallery, segments: dict[str, int], files: Sequence[Path], *, pictures: int, facts: dict[str, Any]
) -> None:
    """Let the manifest speak of other segments, in one step. When this returns, the change outlives a power cut.

    Args:
        segments: names of all of them, in their order, each with its weight (`segments_of`).
        files: those that the manifest does not know yet.
        facts: that change besides.
    """
    earlier = [segment.name for segment in gallery.segments if segment.name not in segments]
    changed = {
        **gallery.facts,
        **version_facts(next_number(gallery), pictures, segments),
        EARLIER: earlier,
        **facts,
    }
    kept = [name for name in gallery.manifest.outputs if Path(name).parts[0] in segments]
    runs.replace_outputs(gallery.manifest, files, changed, unread=kept)
    sweep(gallery.folder, changed)


def version_facts(number: int, pictures: int, segments: dict[str, int]) -> dict[str, Any]:
    """What the manifest says of its current version."""
    return {"version": VERSION.format(number), "pictures": pictures, SEGMENTS: segments}


def entry(*, added: int, removed: int, source: str) -> dict[str, Any]:
    """One change, as the manifest's history has it."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"time": now, "added": added, "removed": removed, "source": source}


def sweep(folder: Path, facts: dict[str, Any]) -> None:
    """Remove all segments, finished or not, but those of a manifest's facts and of the manifest before it."""
    for torn in folder.glob(f".{runs.MANIFEST}.*"):
        torn.unlink()
    _remove(folder, {*segments_of(facts), *facts.get(EARLIER, [])})


def clear(folder: Path) -> None:
    """Remove all segments, finished or not, of a folder that is not finished."""
    _remove(folder, set())


def _remove(folder: Path, kept: set[str]) -> None:
    for path in list(folder.iterdir()):
        if NAMES.fullmatch(path.name) and path.name not in kept:
            shutil.rmtree(path)
