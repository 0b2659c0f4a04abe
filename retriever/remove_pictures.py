"""Remove pictures from the index; their files stay where they are.

In:  a `retriever.build_index` folder, and names of pictures in it: ids, or files.
Out: the index's next version (retriever/gallery.py).
Command: python -m retriever.remove_pictures --index DIR NAME [NAME ...]
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from tools.captions import portable
from tools.commands import run_command
from tools.errors import BadInput
from tools.features import Rows

from .gallery import Gallery, changing, replace_pictures

NAMED = 3  # names that the manifest's history keeps of a change


@dataclass(frozen=True)
class Config:
    """What is removed from which index."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Pictures to remove: each an id, or the path of a file."""
    index: Path
    """Run folder of retriever.build_index."""

    def __post_init__(self) -> None:
        if not self.names:
            raise BadInput("no picture is named: give ids or files")


def as_recorded(name: str) -> str:
    """A path as the index has it: from the repository's root, links in the name of the file itself left alone."""
    path = Path(name)
    return str(Path(portable(path.parent)) / path.name)


def find(gallery: Gallery, names: tuple[str, ...]) -> Rows:
    """Rows of the pictures that have one of the names, as id or as file.

    Raises:
        BadInput: a name is no picture's.
    """
    wanted = set(names) | {as_recorded(name) for name in names}
    found: dict[str, list[int]] = {}
    for row, picture in enumerate(gallery.pictures()):
        for name in {picture.image, picture.file} & wanted:
            found.setdefault(name, []).append(row)
    unknown = [name for name in names if name not in found and as_recorded(name) not in found]
    if unknown:
        raise BadInput(
            f"{len(unknown)} of {len(names)} names are neither the id nor the file of a picture in {gallery.folder}, "
            f"the first: {unknown[0]!r}; nothing was removed"
        )
    return np.unique(np.concatenate(list(found.values())))


def main(config: Config) -> None:
    with changing(config.index) as gallery:
        rows = find(gallery, config.names)
        if len(rows) == len(gallery):
            raise BadInput(
                f"these are all pictures of {config.index}: an index holds at least one; nothing was removed"
            )
        source = ", ".join(config.names[:NAMED]) + (" ..." if len(config.names) > NAMED else "")
        total = replace_pictures(gallery, removed=rows, added=[], codes=gallery.codes[:0], features=None, source=source)
    print(f"{len(rows):,} pictures removed, {total:,} can be found")


if __name__ == "__main__":
    run_command(main, Config)
