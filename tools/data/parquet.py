"""Captions in parquet files, as `datasets` and img2dataset write them; pictures in them are unpacked as shards are."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from pyarrow import parquet

from ..captions import leaves_folder
from ..errors import BadInput
from ..files import replacing
from ..picture_formats import FORMATS, PICTURE_ENDINGS, format_of, identify
from ..shards import UNUSABLE_NAME
from ..texts import is_unicode
from .columns import CAPTION_NAME, IMAGE_NAME, Columns, Wanted, choose, found_in_row, plain, tell_unread
from .found import Found, bad, note
from .splits import split_in_path

ENDING = ".parquet"
ROWS = 256  # read at once
BYTES_ELSEWHERE = "picture whose bytes are not in the file (name the folder of the pictures with --images)"
SUCCESS = "success"  # what img2dataset's column `status` says of a picture that it has fetched


def parquet_files(source: Path) -> list[Path]:
    """The parquet files that a source stands for: itself, or those below it where it is a folder."""
    if source.is_dir():
        return sorted(path for path in source.rglob(f"*{ENDING}") if path.is_file())
    return [source] if source.suffix.lower() == ENDING else []


@dataclass(frozen=True)
class Layout:
    """What the columns of a parquet file hold."""

    names: list[str]
    columns: Columns
    """Of pictures that are in the file, `file` is the column of their names."""
    embedded: bool
    status: int | None
    """Of img2dataset, which keeps rows of pictures that it could not fetch."""

    @property
    def read(self) -> list[str]:
        """Names of the columns that are read."""
        columns = self.columns
        places = {columns.image, columns.file, columns.split, self.status, *columns.captions} - {None}
        return [name for place, name in enumerate(self.names) if place in places]


def read_parquet(
    files: list[Path], wanted: Wanted, images: Path | None, unpacked: Path
) -> Iterator[tuple[Path, Found]]:
    """Every row of parquet files, with its file.

    Args:
        images: folder of the pictures; None where they are in the files.
        unpacked: folder that they are then unpacked into.

    Raises:
        BadInput: a file is no parquet, has no such columns, or its pictures are not where `images` says.
    """
    pictures = Pictures(unpacked)
    told: list[str] = []
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                layout = _layout(file, wanted, path, images)
                if layout.names != told:
                    tell_unread(layout.names, layout.columns, path.name, also=layout.status)
                    told = layout.names
                yield from ((path, row) for row in _rows(file, layout, path, pictures))
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BadInput(f"{path} is damaged or no parquet file ({str(error).splitlines()[0]})") from None


def _layout(file: Any, wanted: Wanted, path: Path, images: Path | None) -> Layout:
    schema = file.schema_arrow
    names = list(schema.names)
    columns, embedded = _columns(names, schema.types, wanted, path)
    if embedded and images is not None and not _has_content(file, names[columns.image]):
        embedded = False  # `datasets` may write their paths alone
    if embedded and images is not None:
        raise BadInput(f"--images {images}: the pictures are in {path.name}, leave it out")
    if not embedded and images is None:
        raise BadInput(f"{path} has the pictures' names alone: name their folder with --images")
    layout = Layout(names, columns, embedded, names.index("status") if {"status", "key"} <= set(names) else None)
    if twice := [name for name in layout.read if names.count(name) > 1]:
        raise BadInput(f"{path}: the column {twice[0]} stands {names.count(twice[0])} times: rename the others")
    return layout


def _has_content(file: Any, name: str) -> bool:
    """Whether a column of pictures holds their bytes, and not their paths alone."""
    batches = file.iter_batches(batch_size=ROWS, columns=[name])
    values = (value for batch in batches for row in batch.to_pylist() if (value := row[name]) is not None)
    first = next(values, None)
    return first is not None and not (isinstance(first, dict) and first.get("bytes") is None and first.get("path"))


def _columns(names: list[str], types: list[Any], wanted: Wanted, path: Path) -> tuple[Columns, bool]:
    """The columns that are read, and whether the pictures are in the file."""
    inside = [place for place, kind in enumerate(types) if holds_pictures(kind)]
    if wanted.image is not None:
        inside = [place for place in inside if plain(names[place]) == plain(wanted.image)]
    else:
        inside = [place for place in inside if not CAPTION_NAME.fullmatch(plain(names[place]))]
    if len(inside) > 1:
        found = ", ".join(names[place] for place in inside)
        raise BadInput(f"{path}: several columns hold pictures ({found}): name one with --image-column")
    if inside:
        (image,) = inside
        other = [place for place, name in enumerate(names) if place != image and IMAGE_NAME.fullmatch(plain(name))]
        columns = choose(names, Wanted(names[image], wanted.captions), str(path))
        return replace(columns, image=image, file=other[0] if len(other) == 1 else None), True
    if wanted.image is None and {"key", "status"} <= set(names):
        wanted = Wanted("key", wanted.captions)
    return choose(names, wanted, str(path)), False


def holds_pictures(kind: Any) -> bool:
    """Whether a column's type is the bytes of pictures, or those with a path, as `datasets` writes them."""
    if pyarrow.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _rows(file: Any, layout: Layout, path: Path, pictures: "Pictures") -> Iterator[Found]:
    split, failed, done = split_in_path(path), 0, 0
    for batch in file.iter_batches(batch_size=ROWS, columns=layout.read):
        for number, values in enumerate(batch.to_pylist(), done + 1):
            cells = [values.get(name) for name in layout.names]
            if layout.status is not None and cells[layout.status] != SUCCESS:
                failed += 1
                continue
            row = _row(cells, layout, path, number, pictures)
            yield row if row.split else row._replace(split=split)
        done += batch.num_rows
    if failed:
        note(f"{path.name}: rows left out, whose status is not {SUCCESS} and which have no picture: {failed:,}")


def _row(cells: list[Any], layout: Layout, path: Path, number: int, pictures: "Pictures") -> Found:
    where, columns = f"{path.name}, row {number}", layout.columns
    if not layout.embedded:
        if isinstance(stated := cells[columns.image], dict):
            if stated.get("bytes") is not None:
                return bad(where, "picture in the file itself, where others are not")
            cells[columns.image] = stated.get("path")
        return found_in_row(cells, columns, where, cells=False)
    name, problem = pictures.unpack(cells[columns.image], _text(cells, columns.file), path, number)
    if problem:
        return bad(where, problem)
    cells[columns.image] = name
    return found_in_row(cells, replace(columns, file=None), where, cells=False)


def _text(cells: list[Any], place: int | None) -> str | None:
    return cells[place] if place is not None and isinstance(cells[place], str) else None


class Pictures:
    """Pictures that are unpacked into a folder, each under a name of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, bytes] = {}

    def unpack(self, value: Any, name: str | None, path: Path, row: int) -> tuple[str, str]:
        """Write a picture's bytes, unless they are there; returns its name and what is wrong with it."""
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            return "", "row without a picture" if value is None else BYTES_ELSEWHERE
        stated = name or (value.get("path") if isinstance(value, dict) else None)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        names = _names(stated, content, path, row, digest.hex())
        file = next(each for each in names if self.known.setdefault(each, digest) == digest)
        if not is_unicode(file) or "\0" in file:
            return "", "picture's name that cannot be a file's"
        target = self.folder / file
        try:
            if not target.is_file() or target.stat().st_size != len(content):
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    temporary.write_bytes(content)
        except OSError as error:
            if error.errno not in UNUSABLE_NAME:
                raise
            return "", "picture's name that cannot be a file's"
        return file, ""


def _names(stated: Any, content: bytes, path: Path, row: int, digest: str) -> Iterator[str]:
    """Names for a picture, the best first: others are for pictures whose name another one has."""
    if isinstance(stated, str) and stated.strip():
        name = PurePosixPath(stated).name if leaves_folder(stated) else str(PurePosixPath(stated))
    else:
        name = f"{path.stem}-{row:07d}"
    if PurePosixPath(name).suffix.lower() not in PICTURE_ENDINGS:
        name += _ending(content)
    yield name
    yield f"{path.stem}/{name}"
    yield f"{digest}/{name}"


def _ending(content: bytes) -> str:
    try:
        with identify(io.BytesIO(content)) as picture:
            return FORMATS[format_of(picture)][0]
    except Exception:  # Pillow raises many kinds for damaged files
        return ".jpg"  # and the check of all pictures says what is wrong
