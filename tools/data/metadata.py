"""The `metadata` tables of Hugging Face's image folders: each names the pictures of the folder in which it lies."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..captions import SPLITS
from .found import Found, note
from .splits import split_named


def in_its_folder(path: Path, rows: Iterable[Found], images: Path) -> Iterator[Found]:
    """The rows of a table as they are meant: `train/metadata.csv` names pictures in `train`, and is of that split.

    Rows of other tables, and of one that lies in `images` itself, stay as they are.
    """
    below = os.path.relpath(path.parent.resolve(), images.resolve())
    if path.stem.lower() != "metadata" or not path.is_file() or below.startswith("."):
        yield from rows
        return
    split = next((name for name in map(split_named, Path(below).parts) if name in SPLITS), None)
    also = f", and its split is {split} where no column says another" if split else ""
    note(f"{below}/{path.name}: its names are those of pictures in {below}{also}")
    for row in rows:
        there = not row.problem and _is_there(images / below / row.file)
        file = f"{below}/{row.file}" if there else row.file
        image = file if row.image == row.file else row.image
        yield row._replace(
            image=image,
            file=file,
            split=split if split_named(row.split) is None else row.split,
            where=f"{below}/{row.where}",
        )


def _is_there(file: Path) -> bool:
    try:
        return os.path.lexists(file)
    except ValueError:  # a NUL character, which the check names
        return False
