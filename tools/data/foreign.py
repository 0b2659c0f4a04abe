"""Sources that no reader here reads, told by their first bytes: what they are, and what to do with them."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import BadInput
from ..picture_listing import holds_picture

START_BYTES = 1024
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # what texts of UTF-16 begin with
WORKBOOK = "is a workbook: save it as CSV"
STARTS = {
    b"\x1f\x8b": "is compressed: unpack it with gunzip",
    b"BZh": "is compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "is compressed: unpack it with unzstd",
    b"7z\xbc\xaf": "is an archive: unpack it and name what it holds",
    b"Rar!": "is an archive: unpack it and name what it holds",
    b"PK\x03\x04": "is a zip archive: unpack it and name what it holds",
    b"\xd0\xcf\x11\xe0": WORKBOOK,
}
WORKBOOKS = frozenset({".xlsx", ".xlsm", ".ods"})  # which are zip archives
TEXT_ENDINGS = frozenset({".csv", ".tsv", ".tab", ".txt", ".psv", ".token", ".jsonl", ".ndjson", ".json"})
POINTER = b"version https://git-lfs"
WEB_PAGE = re.compile(rb"\s*(?:<!doctype html|<html)", re.IGNORECASE)
ARROW = ".arrow"
SAVED = (
    "holds .arrow files, as save_to_disk of `datasets` writes them: turn each split into parquet, in Python with "
    'datasets.load_from_disk("{folder}").to_parquet("{split}.parquet")'
)


def refuse_foreign(source: Path, *, nothing_else: bool) -> None:
    """Refuse a file that is no text of captions, and a folder that holds data of a kind that is not read.

    Args:
        nothing_else: the folder can be nothing else, such as one of pictures.

    Raises:
        BadInput: the message says what it is and what to do.
    """
    if source.is_dir():
        what = folder_advice(source) if nothing_else else ""
    else:
        with source.open("rb") as file:
            what = _what(source, file.read(START_BYTES))
    if what:
        raise BadInput(f"--source {source} {what}")


def folder_advice(source: Path) -> str:
    """What to do with a folder in which no reader finds anything."""
    if any(source.rglob(f"*{ARROW}")):
        split = next(path.parent for path in sorted(source.rglob(f"*{ARROW}")))
        return SAVED.format(folder=split, split=split.name)
    if any(source.rglob("*.tfrecord*")):
        return "holds .tfrecord files, which are not read: write them anew as webdataset shards or parquet"
    return ""


def tables_in(source: Path) -> Sequence[Path]:
    """Tables of captions in a folder or in the folders in it, by their usual names."""
    found = [path for pattern in ("*", "*/*") for path in source.glob(pattern) if path.is_file()]
    return sorted(path for path in found if path.stem in ("metadata", "captions", "results"))


def _what(path: Path, start: bytes) -> str:
    """What a file is that is no text, and what to do with it; empty for a text."""
    for begin, what in STARTS.items():
        if start.startswith(begin):
            return WORKBOOK if path.suffix.lower() in WORKBOOKS else what
    if start.startswith(POINTER):
        return "is a pointer of Git LFS: fetch the file itself with git lfs pull"
    if start.startswith(b"ARROW1") or path.suffix.lower() == ARROW:
        return "is an .arrow file: write a .parquet file from it, with Dataset.to_parquet of `datasets`"
    if WEB_PAGE.match(start):
        return "is a web page: fetch the file itself"
    if start.startswith(UTF16) or b"\0" not in start:
        return ""
    if holds_picture(str(path)):
        return "is a picture: name its folder with --images"
    if start[1::2].count(0) > len(start) / 3 or start[::2].count(0) > len(start) / 3:
        return "may be text in UTF-16: save it as UTF-8"
    if path.suffix.lower() in TEXT_ENDINGS:  # its reader names the line
        return ""
    return "is no text file, and of no kind that is read (docs/layouts.md shows them)"
