"""Remove pictures from the index; their files stay where they are.

In:  a `retriever.gallery.build` folder, and names of pictures in it: ids, or files.
Out: the index's next version (retriever/gallery/gallery.py).
Command: python -m retriever.gallery.remove --index DIR NAME [NAME ...]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.features import Rows

from .gallery import Gallery, changing, replace_pictures
from .options import IndexOptions

NAMED = 3  # names that the manifest's history keeps of a change


@dataclass(frozen=True, kw_only=True)
class Config(IndexOptions):
    """What is removed from which index."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Pictures to remove: each an id, or the path of a file."""

    def __post_init__(self) -> None:
        if not self.names:
            raise BadInput("no picture is named: give ids or files")


class Removed(NamedTuple):
    """What changed."""

    pictures: int
    total: int
    """Pictures that are left."""


def as_recorded(gallery: Gallery, name: str) -> str:
    """A path as the index has it; links in the name of the file itself are left alone."""
    path = Path(name)
    return str(Path(gallery.recorded(path.parent)) / path.name)


def find(gallery: Gallery, names: Sequence[str]) -> Rows:
    """Rows of the pictures that have one of the names, as id or as file.

    Raises:
        BadInput: a name is no picture's.
    """
    recorded = {name: as_recorded(gallery, name) for name in names}
    wanted = {*names, *recorded.values()}
    found: dict[str, list[int]] = {}
    for row, picture in enumerate(gallery.pictures()):
        for name in {picture.image, picture.file} & wanted:
            found.setdefault(name, []).append(row)
    unknown = [name for name in names if name not in found and recorded[name] not in found]
    if unknown:
        raise BadInput(
            f"{len(unknown)} of {len(names)} names are neither the id nor the file of a picture in {gallery.folder}, "
            f"the first: {unknown[0]!r}; nothing was removed"
        )
    return np.unique(np.concatenate(list(found.values())))


def shortened(names: Sequence[str]) -> str:
    """The first names, as the manifest's history has them."""
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")


def remove(index: Path, names: Sequence[str]) -> Removed:
    """Publish a version of the index without the named pictures.

    Raises:
        BadInput: a name is no picture's, they are all pictures, or another process changes the index.
    """
    with changing(index) as gallery:
        rows = find(gallery, names)
        if len(rows) == len(gallery):
            raise BadInput(f"these are all pictures of {index}: an index holds at least one; nothing was removed")
        none = gallery.codes[:0]
        total = replace_pictures(gallery, removed=rows, added=[], codes=none, features=None, source=shortened(names))
    return Removed(len(rows), total)


def main(config: Config) -> None:
    pictures, total = remove(config.index, config.names)
    print(f"{pictures:,} pictures removed, {total:,} can be found")


if __name__ == "__main__":
    run_command(main, Config)
