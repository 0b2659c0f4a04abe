"""The gallery: the pictures that search finds. They come and go without any training.

It is a run folder of `retriever.gallery.build` whose manifest lists immutable segments (retriever/gallery/segments.py).
The first segment has a tree over its codes. The others are changes: each holds pictures that came, and names rows of
earlier segments that went. A reader lays them over the tree (retriever/gallery/overlay.py). So a change writes what
changed and nothing else, and a search finds what it would find in one merged index.

retriever/gallery/publish.py has how a change becomes the current version. Readers need no lock: what a manifest named a
moment ago is still there, and a reader that was overtaken twice starts again.

Rows are counted through all segments, removed pictures included, and change with every merge.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools import runs
from tools.errors import BadInput
from tools.features import Rows

from ..index import Codes, spread
from .compact import HalfFloats, Stored
from .contents import Contents, unknown
from .overlay import NONE, Overlay, find_children, lay_over
from .pictures import Picture
from .segments import CODES, Segment, read_segment

COMMAND = "retriever.gallery.build"
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = "folders"  # the manifest's fact: the folders that pictures were taken from; see `Folder`
KEEPS_FEATURES = "keeps_features"  # the manifest's fact; indexes of earlier versions have neither it nor features
EXPORTED = "exported"  # the manifest's fact of an index inside an exported folder (retriever/gallery/exported.py)
EXPORTED_PICTURES = "pictures"  # the folder beside such an index where its pictures lie
SEGMENTS = "segments"  # the manifest's fact: the names of all segments, in their order, each with its weight
EARLIER = "earlier_segments"  # the same: names of those that readers of the version before may still open
HASHED = 1 << 24  # bytes of a file up to which it is compared with its hash whenever it is opened


class Folder(NamedTuple):
    """A folder whose pictures were put into the gallery."""

    path: str
    """As seen from the gallery's `files_below`."""
    prefix: str
    """What stands before a picture's path below the folder in its id."""


@dataclass(frozen=True)
class Gallery:
    """One version of the pictures, memory-mapped: it stays what it is when the folder's content changes."""

    manifest: runs.Manifest
    segments: list[Segment]
    gone: Rows
    """Rows that were removed, ascending."""

    def __len__(self) -> int:
        """Pictures that can be found."""
        return self.rows_in_all - len(self.gone)

    @property
    def rows_in_all(self) -> int:
        """Rows, those of removed pictures included."""
        return self.segments[-1].first + len(self.segments[-1])

    @property
    def folder(self) -> Path:
        return self.manifest.folder

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.facts

    @property
    def codebooks_hash(self) -> str:
        """What the codes mean, as in `RetrieverData`."""
        return str(self.facts["codebooks"])

    @property
    def clip(self) -> tuple[str, str | None]:
        """Name or folder, and tag, of the two-tower model that encodes its pictures."""
        made_by = self.facts["clip"]
        return self._place(made_by["model"]), made_by["pretrained"]

    @property
    def clip_facts(self) -> dict[str, Any]:
        """The same with all that is known of it."""
        return {**self.facts["clip"], "model": self.clip[0]}

    @property
    def rqvae(self) -> Path:
        """Run folder of the tokenizer that codes its pictures."""
        return Path(self._place(self.facts["rqvae"]["path"]))

    def check_clip(self, advice: str) -> None:
        """Refuse a two-tower model that is no longer the one that made the features.

        Args:
            advice: what to do where it is not.

        Raises:
            BadInput: its files have changed.
        """
        places = [each for each in self.clip if each and Path(each).is_absolute()]
        self._refuse_changed(
            " or ".join(places) or self.clip[0], model_content(*self.clip), self.facts["clip"]["content"], advice
        )

    def check_rqvae(self, advice: str) -> Path:
        """The tokenizer's run folder, if it is still the one that made the codes.

        Args:
            advice: what to do where it is not.

        Raises:
            BadInput: its files have changed, or it is not finished.
        """
        folder = runs.read_manifest(self.rqvae, "RQ-VAE.train").folder
        self._refuse_changed(str(folder), runs.fingerprint(folder), self.facts["rqvae"]["content"], advice)
        return folder

    def _refuse_changed(self, name: str, content: Any, recorded: Any, advice: str) -> None:
        if content != recorded:
            raise BadInput(f"{name} has changed, or was moved or removed, since {self.folder} was built: {advice}")

    def _place(self, recorded: str) -> str:
        return str(self.folder.parent / recorded) if EXPORTED in self.facts else recorded

    @cached_property
    def files_below(self) -> Path:
        """What the pictures' files are relative to: the repository's root, as seen from the current folder, which it
        nearly always is; of an exported index the pictures beside it, or where they were when it was exported."""
        if EXPORTED not in self.facts:
            return Path() if Path.cwd() == ROOT else ROOT
        beside, earlier = self.folder.parent / EXPORTED_PICTURES, self.facts[EXPORTED]["pictures"]
        return Path(earlier) if earlier and Path(earlier).is_dir() and not beside.is_dir() else beside

    @property
    def folders(self) -> list[Folder]:
        """Where its pictures came from; empty in galleries of an earlier program."""
        return [Folder(**each) for each in self.facts.get(FOLDERS, [])]

    def recorded(self, path: Path) -> str:
        """A path as its pictures have it: relative to `files_below` when it lies there."""
        absolute, below = path.resolve(), self.files_below.resolve()
        return str(absolute.relative_to(below)) if absolute.is_relative_to(below) else str(absolute)

    def spellings(self, path: Path) -> list[str]:
        """Paths by which its pictures may have a file or folder, the one as written first. What was found behind a link
        that was followed lies below that link, so links are followed in none, some or all folders on the way."""
        found = (Path(self.recorded(folder)) / path.relative_to(folder) for folder in reversed(path.parents))
        return list(dict.fromkeys(map(str, found)))

    @property
    def keeps_features(self) -> bool:
        """Whether the pictures' features lie in the gallery: of the model that `facts["clip"]` names."""
        return bool(self.facts.get(KEEPS_FEATURES))

    @cached_property
    def rows(self) -> Rows:
        """Rows of all pictures that can be found, ascending."""
        return np.delete(np.arange(self.rows_in_all), self.gone)

    def stays(self, rows: Rows) -> NDArray[np.bool_]:
        """Whether each row's picture can be found."""
        if not len(self.gone):
            return np.ones(len(rows), dtype=bool)
        return self.gone[np.searchsorted(self.gone, rows).clip(max=len(self.gone) - 1)] != rows

    def read_codes(self, rows: Rows | None = None) -> Codes:
        """(rows, levels); by default of all pictures that can be found"""
        return self._gathered(rows, lambda segment: segment.codes)

    def code(self, row: int) -> tuple[int, ...]:
        """(levels,) of one picture"""
        return tuple(self.read_codes(np.array([row]))[0].tolist())

    def read_features(self, rows: Rows | None = None) -> HalfFloats:
        """(rows, width), normalised, of a gallery that keeps features; by default of all pictures that can be found"""
        stored, codec = self.stored_features(rows), self.segments[0].codec
        return stored if codec is None else codec.decode(stored)

    def stored_features(self, rows: Rows | None = None) -> Stored:
        """The same as they are kept"""
        return self._gathered(rows, _features_of)

    def read_contents(self, rows: Rows) -> Contents:
        """What the files of rows held, unknown where an earlier program did not note it."""
        if not len(rows):
            return unknown(0)
        parts = list(self.by_segment(rows))
        return _in_order(rows, [places for *_, places in parts], [part.store.contents(own) for part, own, _ in parts])

    def picture(self, row: int) -> Picture:
        """The picture of a row."""
        [(segment, own, _)] = self.by_segment(np.array([row]))
        return segment.store.picture(int(own[0]))

    def pictures(self) -> Iterator[Picture]:
        """All pictures that can be found, in the order of rows."""
        for segment in self.segments:
            stay = self.stays(segment.first + np.arange(len(segment)))
            yield from (picture for picture, stays in zip(segment.store.pictures(), stay, strict=True) if stays)

    def row(self, image: str) -> int | None:
        """Row of the picture that has an id; None where no picture has."""
        return next(iter(self.with_images([image])), None)

    def with_images(self, images: Sequence[str]) -> dict[int, Picture]:
        """Pictures that have one of some ids, by row."""
        return self._found(lambda segment: segment.store.with_images(images))

    def with_files(self, files: Sequence[str]) -> dict[int, Picture]:
        """Pictures that have one of some files, by row."""
        return self._found(lambda segment: segment.store.with_files(files))

    def below(self, folder: str) -> dict[int, Picture]:
        """Pictures whose file lies below a folder, as `recorded` gives it, by row."""
        return self._found(lambda segment: segment.store.below(beginning(folder)))

    @cached_property
    def overlay(self) -> Overlay:
        """What a search walks: the first segment's tree and what has changed since."""
        index = self.segments[0].index
        assert index is not None, "the first segment has a tree"
        gone = self.gone[: np.searchsorted(self.gone, len(self.segments[0]))]
        rows = np.arange(len(self.segments[0]), self.rows_in_all)
        come = rows[self.stays(rows)]
        return lay_over(index, gone=(self.read_codes(gone), gone), come=(self.read_codes(come), come))

    @property
    def tree_hash(self) -> str:
        """Of the codes of the tree: equal hashes, equal trees."""
        return self.manifest.outputs[f"{self.segments[0].name}/{CODES}"]

    def codes_behind(self, prefixes: Codes, *, without: Rows) -> Codes:
        """Codes (others, levels) of the pictures whose codes but the last are among prefixes (any number, levels - 1).

        Args:
            without: rows that are passed over.
        """
        some = np.unique(prefixes, axis=0) if prefixes.shape[1] else prefixes[:1]
        rows = np.concatenate([_rows_behind(segment, some) for segment in self.segments])
        return self.read_codes(rows[self.stays(rows) & ~np.isin(rows, without)])

    def _found(self, ask: Callable[[Segment], list[tuple[int, Picture]]]) -> dict[int, Picture]:
        found = {segment.first + row: picture for segment in self.segments for row, picture in ask(segment)}
        rows = np.array(sorted(found), dtype=np.int64)
        return {row: found[row] for row in rows[self.stays(rows)].tolist()}

    def by_segment(self, rows: Rows) -> Iterator[tuple[Segment, Rows, Rows]]:
        """Segments that have some of the rows; these rows within each, and their places among all."""
        owners = np.searchsorted([segment.first for segment in self.segments], rows, side="right") - 1
        for number in np.unique(owners).tolist():
            places = np.flatnonzero(owners == number)
            yield self.segments[number], rows[places] - self.segments[number].first, places

    def _gathered(self, rows: Rows | None, part: Callable[[Segment], NDArray[Any]]) -> NDArray[Any]:
        rows = self.rows if rows is None else rows
        if not len(rows):
            return part(self.segments[0])[:0]
        parts = list(self.by_segment(rows))
        return _in_order(rows, [places for *_, places in parts], [_some(part(each), own) for each, own, _ in parts])


def beginning(folder: str) -> str:
    """What the paths of the files below a folder begin with; nothing where that is the current folder.

    >>> beginning("photos"), beginning("/"), beginning(".")
    ('photos/', '/', '')
    """
    place = Path(folder)
    return "" if place == Path() else f"{place}/".replace("//", "/")


def _features_of(segment: Segment) -> Stored:
    assert segment.features is not None, "only features that are kept can be read"
    return segment.features


def _some(array: NDArray[Any], rows: Rows) -> NDArray[Any]:
    """Rows of an array; those that follow one another are not copied."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and (np.diff(rows) == 1).all():
        return array[first : last + 1]
    return array[rows]


def _in_order(rows: Rows, places: list[Rows], found: list[NDArray[Any]]) -> NDArray[Any]:
    """What was found at places among the rows, put together."""
    if len(found) == 1:
        return found[0]
    whole = np.empty((len(rows), *found[0].shape[1:]), dtype=np.result_type(*found))  # the largest codes may be new
    for place, part in zip(places, found, strict=True):
        whole[place] = part
    return whole


def _rows_behind(segment: Segment, prefixes: Codes) -> Rows:
    """Rows of the gallery whose pictures in this segment have one of the prefixes (any number, levels - 1)."""
    if segment.index is not None:
        nodes: Rows = np.zeros(len(prefixes), dtype=np.int64)
        for level, column in zip(segment.index.levels[:-1], prefixes.T, strict=True):
            nodes = find_children(level, nodes, column.astype(np.int64))
        offsets = segment.index.levels[-1].offsets
        known = nodes[nodes != NONE]
        leaves, _ = spread(offsets.at(known), offsets.at(known + 1))
        return segment.index.expand(leaves)[0]
    rows: Rows = np.arange(len(segment))
    for number, column in enumerate(prefixes.T):
        rows = rows[np.isin(segment.codes[rows, number], column)]
    wanted = {prefix.tobytes() for prefix in prefixes.astype(np.int64)}
    own = segment.codes[rows, :-1].astype(np.int64)
    return segment.first + rows[np.array([code.tobytes() in wanted for code in own], dtype=bool)]


def read_gallery(folder: Path) -> Gallery:
    """Open the current version: milliseconds at any size, and safe while another process changes the pictures.

    Small files are compared with their hashes, large ones by their sizes alone; `VERIFY=all` compares all of them.

    Raises:
        BadInput: the folder is not finished, or its files are damaged.
    """
    below = folder / "index"
    if not (folder / runs.MANIFEST).exists() and (below / runs.MANIFEST).exists():
        raise BadInput(f"{folder} is no index but has one, as an exported retriever does: name {below}")
    manifest = read_index_manifest(folder)
    while True:
        try:
            return _open(manifest)
        except BadInput:
            newer = read_index_manifest(folder)
            if newer == manifest:
                raise
            manifest = newer


def refreshed(gallery: Gallery) -> Gallery:
    """The gallery itself while its pictures are the current ones, else the version that is."""
    return gallery if read_index_manifest(gallery.folder) == gallery.manifest else read_gallery(gallery.folder)


def segments_of(facts: dict[str, Any]) -> dict[str, int]:
    """Names of the segments that a manifest's facts list, and the pictures that each adds or removes: what merging it
    costs. A version of an earlier program is one itself."""
    found: dict[str, int] = facts.get(SEGMENTS, {facts["version"]: facts["pictures"]})
    return found


def model_content(*places: str | None) -> list[str]:
    """Fingerprints of those places that are files or folders: a model known by its name alone has none."""
    return [runs.fingerprint(Path(place)) for place in places if place and Path(place).exists()]


def read_index_manifest(folder: Path) -> runs.Manifest:
    return runs.read_manifest(folder, COMMAND, hashed=HASHED)


def _open(manifest: runs.Manifest) -> Gallery:
    segments: list[Segment] = []
    first, facts = 0, manifest.facts
    for name in segments_of(facts):
        options = {"levels": facts["levels"], "keeps_features": bool(facts.get(KEEPS_FEATURES))}
        segments.append(read_segment(manifest.folder, name, first=first, **options))
        first += len(segments[-1])
    firsts = {segment.number: segment.first for segment in segments}
    gone = [
        firsts[each.segment] + each.rows
        for segment in segments
        for each in segment.store.gone()
        if each.segment in firsts  # of another, they went when it was merged
    ]
    return Gallery(manifest, segments, np.unique(np.concatenate([np.empty(0, dtype=np.int64), *gone])))
