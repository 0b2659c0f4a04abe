"""Write the codes of the index's pictures as a catalogue of semantic ids (tools/catalogue.py).

In:  a `retriever.gallery.build` folder.
Out: one parquet file: id, file, codes, tokens and collision, a row per picture.
Command: python -m retriever.gallery.export_codes --index DIR codes.parquet
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from tools.catalogue import write_catalogue
from tools.command_line.commands import run_command
from tools.errors import BadInput
from tools.vokens import VokenSpace

from .gallery import Gallery, read_gallery
from .options import IndexOptions


@dataclass(frozen=True, kw_only=True)
class Config(IndexOptions):
    """Whose codes are written, and where."""

    file: tyro.conf.Positional[Path]
    """Parquet file to write."""
    overwrite: bool = False
    """Replace the file where it is there."""

    def __post_init__(self) -> None:
        if self.file.is_dir():
            raise BadInput(f"{self.file} is a folder: name a file in it")


def export_codes(gallery: Gallery, file: Path) -> None:
    """Write the file."""
    facts, pictures = gallery.facts, list(gallery.pictures())
    write_catalogue(
        file,
        [picture.image for picture in pictures],
        [picture.file for picture in pictures],
        gallery.read_codes().astype(np.int64),
        VokenSpace(facts["levels"], facts["codebook_size"], facts["shared"]),
        {
            "codebooks": gallery.codebooks_hash,
            "resolved": facts["resolve_collisions"],
            "clip": {name: facts["clip"][name] for name in ("model", "pretrained")},
        },
    )


def main(config: Config) -> None:
    if config.file.exists() and not config.overwrite:
        raise BadInput(f"{config.file} is there already: replace it with --overwrite, or name another file")
    gallery = read_gallery(config.index)
    config.file.parent.mkdir(parents=True, exist_ok=True)
    export_codes(gallery, config.file)
    print(f"{len(gallery):,} pictures with {gallery.facts['levels']} codes each -> {config.file}")


if __name__ == "__main__":
    run_command(main, Config)
