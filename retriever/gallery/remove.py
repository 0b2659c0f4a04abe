"""Remove pictures from the index; their files stay where they are.

In:  a `retriever.gallery.build` folder, and names of pictures in it: ids, or files.
Out: the index's next version (retriever/gallery/publish.py).
Command: python -m retriever.gallery.remove --index DIR NAME [NAME ...]
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from tools.command_line.commands import run_command
from tools.command_line.place import user_folder
from tools.errors import BadInput
from tools.features import Rows
from tools.files import is_file
from tools.texts import plural

from .gallery import Gallery
from .options import IndexOptions
from .publish import changing, replace_pictures

NAMED = 3  # names that the manifest's history keeps of a change


@dataclass(frozen=True, kw_only=True)
class Config(IndexOptions):
    """What is removed from which index."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Pictures to remove: each an id, or the path of a file. "./car.jpg" is always a file."""

    def __post_init__(self) -> None:
        if not self.names:
            raise BadInput("no picture is named: give ids or files")


class Removed(NamedTuple):
    """What changed."""

    pictures: int
    total: int
    """Pictures that are left."""


def is_path(name: str) -> bool:
    """Whether a name can only be a file's.

    >>> [name for name in ("./car.jpg", "../car.jpg", "/a/car.jpg", "car.jpg", "2024/car.jpg") if is_path(name)]
    ['./car.jpg', '../car.jpg', '/a/car.jpg']
    """
    return name.startswith(("./", "../", "/"))


def find(gallery: Gallery, names: Sequence[str], *, seen_from: Path) -> Rows:
    """Rows of the pictures that have one of the names, as id or as file.

    Args:
        seen_from: the folder to which names of files are relative.

    Raises:
        BadInput: a name is no picture's, or the id of one picture and the file of another.
    """
    spellings = {name: gallery.spellings(seen_from / name) for name in names}
    images = {name for name in names if not is_path(name)}
    with_id = {picture.image: row for row, picture in gallery.with_images(sorted(images)).items()}
    rows_of: dict[str, list[int]] = {}
    for row, picture in gallery.with_files(sorted({file for each in spellings.values() for file in each})).items():
        rows_of.setdefault(picture.file, []).append(row)
    with_file = {name: next((rows_of[file] for file in spellings[name] if file in rows_of), []) for name in names}
    unknown = [name for name in names if name not in with_id and not with_file[name]]
    if unknown:
        count = f"{len(unknown)} of {plural(len(names), 'name')} {'is' if len(unknown) == 1 else 'are'}"
        raise BadInput(
            f"{count} neither the id nor, as seen from {seen_from.resolve()}, the file of a picture in "
            f"{gallery.folder}, the first: {unknown[0]!r}; nothing was removed"
        )
    for name, row in with_id.items():
        _refuse_two_meanings(gallery, name, row, with_file[name], seen_from)
    by_file = [row for name in names for row in with_file[name]]
    return np.unique(np.array([*with_id.values(), *by_file], dtype=np.int64))


def _refuse_two_meanings(gallery: Gallery, name: str, row: int, others: list[int], seen_from: Path) -> None:
    """Refuse a name that is the id of the picture in `row`, where it is also another file seen from a folder."""
    if row in others or not (others or is_file(seen_from / name)):
        return
    own, here = gallery.files_below / gallery.picture(row).file, seen_from / name
    if not others and is_file(own) and own.samefile(here):
        return
    raise BadInput(
        f"{name!r} is the id of {own.absolute()}, and also a file in {seen_from.resolve()}: write "
        f"{shlex.quote(f'./{name}')} for the file here, or {shlex.quote(str(own.absolute()))} for the picture with "
        "this id; nothing was removed"
    )


def first_names(names: Sequence[str]) -> str:
    """The first names, as the manifest's history has them."""
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")


def remove(index: Path, names: Sequence[str], *, seen_from: Path | None = None) -> Removed:
    """Publish a version of the index without the named pictures.

    Args:
        seen_from: the folder to which names of files are relative; by default the current one.

    Raises:
        BadInput: a name is no picture's, or the id of one and the file of another; they are all pictures; or another
            process changes the index.
    """
    with changing(index) as gallery:
        rows = find(gallery, names, seen_from=seen_from or Path.cwd())
        if len(rows) == len(gallery):
            raise BadInput(f"these are all pictures of {index}: an index holds at least one; nothing was removed")
        total = replace_pictures(gallery, removed=rows, added=None, source=first_names(names))
    return Removed(len(rows), total)


def main(config: Config) -> None:
    pictures, total = remove(config.index, config.names, seen_from=user_folder())
    print(f"{plural(pictures, 'picture')} removed, {total:,} can be found")


if __name__ == "__main__":
    run_command(main, Config)
