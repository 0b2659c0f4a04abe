"""The one caption format: a line per image.

    {"image": "1000092795.jpg", "file": "1000092795.jpg", "split": "train", "captions": ["Two young guys ...", ...]}

`image` is the image's id, `file` its path below the image folder, `captions` any number of texts, none for a picture
that can be found but not trained on.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from .command_line.command_names import again
from .errors import BadInput
from .files import read_json_lines, write_json_lines
from .runs import Manifest, read_manifest

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FILE_NAME = "captions.jsonl"
COMMAND = "tools.prepare_captions"


class Record(NamedTuple):
    """One picture and its captions."""

    image: str
    file: str
    split: Split
    captions: tuple[str, ...]


class CaptionSet(NamedTuple):
    """A finished `prepare_captions` folder: the records, and the folder that `Record.file` is relative to."""

    records: list[Record]
    images: Path
    manifest: Manifest


def write_captions(path: Path, records: Iterable[Record]) -> int:
    """Write the caption format. Returns the number of pictures."""
    return write_json_lines(path, (record._asdict() for record in records))


def read_captions(folder: Path) -> CaptionSet:
    """Read what `tools.prepare_captions` wrote.

    Raises:
        BadInput: the folder is not finished, or a line is not a record; the message names it.
    """
    manifest = read_manifest(folder, COMMAND)
    return CaptionSet(read_records(folder / FILE_NAME), Path(manifest.facts["images"]), manifest)


def read_records(path: Path) -> list[Record]:
    """Read one file of the caption format."""
    records = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        if missing := [key for key in Record._fields if key not in row]:
            raise BadInput(f"{where}: no {missing[0]!r} in it; {again(COMMAND)}")
        if row["split"] not in SPLITS:
            raise BadInput(f"{where}: split is {row['split']!r}, expected one of {', '.join(SPLITS)}")
        if not _is_record(row):
            raise BadInput(f"{where}: image and file must be texts, captions a list of texts; {again(COMMAND)}")
        if leaves_folder(row["file"]):
            raise BadInput(f"{where}: file {row['file']!r} lies outside the folder of pictures; {again(COMMAND)}")
        records.append(Record(row["image"], row["file"], row["split"], tuple(row["captions"])))
    return records


def mend_picture() -> str:
    """What to do about a picture that could be read when the captions were prepared, and cannot be read any more."""
    return f"mend it, or {again(COMMAND)} --skip-bad, which leaves it out"


def leaves_folder(file: str) -> bool:
    """Whether a file name leads out of the folder that it is relative to, links aside.

    >>> [leaves_folder(file) for file in ("a/b.jpg", "../b.jpg", "a/../../b.jpg", "/b.jpg")]
    [False, True, True, True]
    """
    path = Path(file)
    return path.is_absolute() or ".." in path.parts or "\0" in file


def _is_record(row: dict[str, Any]) -> bool:
    texts = row["captions"]
    names = isinstance(row["image"], str) and isinstance(row["file"], str)
    return names and isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def query_owners(records: list[Record]) -> list[int]:
    """For each caption, in order, the row of its picture: the layout of every caption array."""
    return [row for row, record in enumerate(records) for _ in record.captions]


def first_captions(pictures: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Places of the first `count` captions of each picture, sorted, where caption i is one of picture `pictures[i]`.

    >>> first_captions(np.array([7, 7, 7, 2, 7, 2]), 2).tolist()
    [0, 1, 3, 5]
    """
    by_picture = np.argsort(pictures, kind="stable")
    ordered = pictures[by_picture]
    number = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)  # of a caption among its picture's
    return np.sort(by_picture[number < count])


def portable(path: Path) -> str:
    """A path as it goes into a manifest: relative to the current folder when it lies below it."""
    absolute = path.resolve()
    root = Path.cwd().resolve()
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)
