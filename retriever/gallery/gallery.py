"""The gallery: the pictures that search finds. They come and go without any training.

It is a run folder of `retriever.gallery.build` whose manifest points at one complete version of the content:

version-000007/     the arrays of the tree (retriever/index.py)
    codes.npy       (pictures, levels), in the order of rows
    pictures.jsonl  {"image": id, "file": path} a line per row; the path as seen from the repository's root
    lines.npy       (pictures + 1,) int64 bytes, where each line begins
    features.npy    (pictures, width) float16, the pictures' normalised features, where they are kept
    contents.npy    (pictures,) what their files held when they were encoded (retriever/gallery/contents.py); versions
                    of earlier programs have none

A change writes a new version under a temporary name, renames it, and replaces the manifest in one step; then all but
the new version and the one before it go. So readers need no lock: what a manifest named a moment ago is still there,
and one that was overtaken twice starts again. Writers hold the folder's lock, and remove what a killed one left.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools import runs
from tools.errors import BadInput
from tools.features import Floats, Rows, normalized
from tools.files import read_array, remove_torn, replacing, write_array

from ..index import VokenIndex, load_index
from .contents import Contents, unknown
from .large_index import write_index

COMMAND = "retriever.gallery.build"
ROOT = Path(__file__).resolve().parents[2]
CODES, PICTURES, LINES, FEATURES = "codes.npy", "pictures.jsonl", "lines.npy", "features.npy"
CONTENTS = "contents.npy"
FOLDERS = "folders"  # the manifest's fact: the folders that pictures were taken from; see `Folder`
KEEPS_FEATURES = "keeps_features"  # the manifest's fact; indexes of earlier versions have neither it nor features
FEATURE_BLOCK = 65_536  # rows that are normalised at a time
EXPORTED = "exported"  # the manifest's fact of an index inside an exported folder (retriever/gallery/exported.py)
EXPORTED_PICTURES = "pictures"  # the folder beside such an index where its pictures lie
VERSION = "version-{:06d}"
HISTORY = 100  # changes that the manifest remembers

HalfFloats = NDArray[np.float16]


class Picture(NamedTuple):
    """One picture that can be found."""

    image: str
    """Its id."""
    file: str
    """Its path, as seen from the gallery's `files_below`: the repository's root."""

    def line(self) -> bytes:
        """As it stands in pictures.jsonl."""
        return json.dumps(self._asdict(), ensure_ascii=False).encode() + b"\n"


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
    index: VokenIndex
    codes: NDArray[np.integer]
    """(pictures, levels)"""
    text: NDArray[np.uint8]
    """(bytes,) of pictures.jsonl"""
    lines: NDArray[np.int64]
    """(pictures + 1,)"""
    features: HalfFloats | None
    """(pictures, width), normalised, of the model that `facts["clip"]` names; None where they are not kept"""
    contents: Contents | None = None
    """(pictures,); None in a version of an earlier program"""

    def __len__(self) -> int:
        return len(self.codes)

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

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each picture's id; made on first use, from all lines."""
        return {picture.image: row for row, picture in enumerate(self.pictures())}

    def recorded(self, path: Path) -> str:
        """A path as its pictures have it: relative to `files_below` when it lies there."""
        absolute, below = path.resolve(), self.files_below.resolve()
        return str(absolute.relative_to(below)) if absolute.is_relative_to(below) else str(absolute)

    def line(self, row: int) -> bytes:
        return self.text[self.lines[row] : self.lines[row + 1]].tobytes()

    def picture(self, row: int) -> Picture:
        """The picture of a row, found by its place in the file."""
        return Picture(**json.loads(self.line(row)))

    def pictures(self) -> Iterator[Picture]:
        """All pictures, in the order of rows."""
        return (self.picture(row) for row in range(len(self)))


def read_gallery(folder: Path) -> Gallery:
    """Open the current version: milliseconds at any size, and safe while another process changes the pictures.

    Raises:
        BadInput: the folder is not finished, or its files are damaged.
    """
    below = folder / "index"
    if not (folder / runs.MANIFEST).exists() and (below / runs.MANIFEST).exists():
        raise BadInput(f"{folder} is no index but has one, as an exported retriever does: name {below}")
    manifest = runs.read_manifest(folder, COMMAND)
    while True:
        try:
            return _open(manifest)
        except BadInput:
            newer = runs.read_manifest(folder, COMMAND)
            if newer == manifest:
                raise
            manifest = newer


def refreshed(gallery: Gallery) -> Gallery:
    """The gallery itself while its pictures are the current ones, else the version that is."""
    current = runs.read_manifest(gallery.folder, COMMAND).facts["version"] == gallery.facts["version"]
    return gallery if current else read_gallery(gallery.folder)


@contextmanager
def changing(folder: Path) -> Iterator[Gallery]:
    """Hold the folder for a change, and remove what a killed change left.

    Raises:
        BadInput: the folder is not finished, or another process changes it.
    """
    runs.read_manifest(folder, COMMAND)
    with runs.hold(folder):
        gallery = read_gallery(folder)
        keep_versions(folder, latest=_number(gallery.manifest))
        remove_torn(folder)
        yield gallery


class Content(NamedTuple):
    """All pictures of a version, in the order of rows."""

    codes: NDArray[np.integer]
    """(pictures, levels)"""
    lines: Iterable[bytes]
    features: HalfFloats | None
    """(pictures, width), of `half_normalized`; None where none are kept"""
    contents: Contents | None
    """(pictures,)"""


def replace_pictures(
    gallery: Gallery,
    *,
    removed: Rows,
    added: Sequence[Picture],
    codes: NDArray[np.integer],
    features: Floats | None,
    source: str,
    contents: Contents | None = None,
    folders: Sequence[Folder] = (),
) -> int:
    """Publish a version without the rows `removed` and with pictures behind the rows that stay, whose codes stay.

    Args:
        gallery: what `changing` gave.
        codes: (added, levels)
        features: (added, width), as the image tower gives them; None where nothing is added or none are kept.
        source: where the change comes from, for the manifest's history.
        contents: (added,) of the files; None where they are not known.
        folders: that the pictures were taken from.

    Returns:
        The number of pictures in the new version.
    """
    stay = np.delete(np.arange(len(gallery)), removed)
    lines = chain((gallery.line(row) for row in stay.tolist()), (picture.line() for picture in added))
    kept = None
    if gallery.features is not None:
        kept = gallery.features[stay]
        if features is not None:
            kept = np.concatenate([kept, half_normalized(features)])
    noted = np.concatenate([contents_of(gallery)[stay], unknown(len(added)) if contents is None else contents])
    content = Content(np.concatenate([gallery.codes[stay], codes]), lines, kept, noted)
    change = entry(added=len(added), removed=len(removed), source=source)
    return publish(gallery, content, change, folders=folders)


def contents_of(gallery: Gallery) -> Contents:
    """What the files held, unknown where an earlier program did not note it."""
    return unknown(len(gallery)) if gallery.contents is None else gallery.contents


def publish(gallery: Gallery, content: Content, change: dict[str, Any], *, folders: Sequence[Folder] = ()) -> int:
    """Write a version and let the manifest speak of it. Returns the number of its pictures.

    Args:
        gallery: what `changing` gave.
        change: an `entry` of the history.
        folders: that pictures were taken from, besides those that are known.
    """
    folder, number = gallery.folder, _number(gallery.manifest) + 1
    files = write_version(
        folder, content.codes, content.lines, features=content.features, contents=content.contents, number=number
    )
    places = list(dict.fromkeys([*gallery.folders, *folders]))
    facts = {
        **gallery.facts,
        **version_facts(number, len(content.codes)),
        FOLDERS: [each._asdict() for each in places],
        "history": [*gallery.facts["history"], change][-HISTORY:],
    }
    runs.replace_outputs(gallery.manifest, files, facts)
    keep_versions(folder, latest=number)
    return len(content.codes)


def version_facts(number: int, pictures: int) -> dict[str, Any]:
    """What the manifest says of its current version."""
    return {"version": VERSION.format(number), "pictures": pictures}


def entry(*, added: int, removed: int, source: str) -> dict[str, Any]:
    """One change, as the manifest's history has it."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"time": now, "added": added, "removed": removed, "source": source}


def half_normalized(features: Floats) -> HalfFloats:
    """Features (pictures, width) as the gallery keeps them: divided by their L2 norm, in half precision."""
    kept = np.empty(features.shape, dtype=np.float16)
    for start in range(0, len(features), FEATURE_BLOCK):
        kept[start : start + FEATURE_BLOCK] = normalized(features[start : start + FEATURE_BLOCK])
    return kept


def write_version(
    folder: Path,
    codes: NDArray[np.integer],
    lines: Iterable[bytes],
    *,
    features: HalfFloats | None,
    contents: Contents | None = None,
    number: int,
) -> list[Path]:
    """Write one version, complete or not at all, which no manifest names yet. Returns its files.

    Args:
        codes: (pictures, levels) of at least one picture.
        lines: the pictures' lines (`Picture.line`), in the order of codes.
        features: (pictures, width) of `half_normalized`, in the order of codes; None to keep none.
        contents: (pictures,) of their files; None where they are not known.
    """
    assert features is None or len(features) == len(codes), f"{len(features)} features of {len(codes)} pictures"
    version = folder / VERSION.format(number)
    temporary = version.with_name(f".{version.name}")
    temporary.mkdir()
    write_index(temporary, codes)
    write_array(temporary / CODES, codes.astype(load_index(temporary, codes.shape[1]).levels[0].codes.dtype))
    ends = [0]
    with replacing(temporary / PICTURES) as path, path.open("wb") as file:
        for line in lines:
            ends.append(ends[-1] + file.write(line))
    write_array(temporary / LINES, np.array(ends, dtype=np.int64))
    if features is not None:
        write_array(temporary / FEATURES, features)
    if contents is not None:
        write_array(temporary / CONTENTS, contents)
    temporary.rename(version)
    return sorted(version.iterdir())


def keep_versions(folder: Path, *, latest: int) -> None:
    """Remove all versions, finished or not, but the latest and the one before it."""
    kept = {VERSION.format(number) for number in (latest - 1, latest)}
    for path in [*folder.glob("version-*"), *folder.glob(".version-*")]:
        if path.name not in kept:
            shutil.rmtree(path)


def model_content(*places: str | None) -> list[str]:
    """Fingerprints of those places that are files or folders: a model known by its name alone has none."""
    return [runs.fingerprint(Path(place)) for place in places if place and Path(place).exists()]


def _number(manifest: runs.Manifest) -> int:
    return int(manifest.facts["version"].rpartition("-")[2])


def _open(manifest: runs.Manifest) -> Gallery:
    folder = manifest.folder / manifest.facts["version"]
    index = load_index(folder, manifest.facts["levels"])
    codes, lines = read_array(folder / CODES), read_array(folder / LINES)
    features = read_array(folder / FEATURES) if manifest.facts.get(KEEPS_FEATURES) else None
    contents = read_array(folder / CONTENTS) if (folder / CONTENTS).is_file() else None
    try:
        text = np.memmap(folder / PICTURES, dtype=np.uint8, mode="r")
    except (FileNotFoundError, ValueError):
        raise BadInput(f"{folder / PICTURES} is missing or empty: build the index again") from None
    if not len(codes) == len(lines) - 1 == len(index.pictures) or lines[-1] != len(text):
        raise BadInput(f"{folder}: {CODES}, {LINES} and {PICTURES} do not fit together: build the index again")
    if features is not None and len(features) != len(codes):
        raise BadInput(
            f"{folder}: {FEATURES} has {len(features)} rows for {len(codes)} pictures: build the index again"
        )
    if contents is not None and len(contents) != len(codes):
        raise BadInput(
            f"{folder}: {CONTENTS} has {len(contents)} rows for {len(codes)} pictures: build the index again"
        )
    return Gallery(manifest, index, codes, text, lines, features, contents)
