"""The pictures of a collection that `RQ-VAE.encode_shards` has coded, read block by block from their tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools import runs
from tools.captions import portable
from tools.code_tables import Block, Head, Tables, total
from tools.errors import BadInput
from tools.files import read_json_lines
from tools.vokens import VokenSpace

from .contents import unknown
from .pictures import Picture
from .segments import Block as SegmentBlock
from .segments import Shape

CODED_BY = "RQ-VAE.encode_shards"
SHARDS, LOCAL = "shards.jsonl", "file://"


@dataclass(frozen=True)
class Collection:
    """A finished folder of `RQ-VAE.encode_shards`; its tables may lie elsewhere."""

    manifest: runs.Manifest
    tables: Tables
    heads: list[Head]
    """Of all tables, in the order of the pictures."""

    def __len__(self) -> int:
        """Pictures with codes."""
        return total(self.heads)

    @property
    def space(self) -> VokenSpace:
        return VokenSpace(**{name: self.manifest.facts[name] for name in VokenSpace._fields})

    @property
    def width(self) -> int | None:
        """Of the features; None where none were kept."""
        width: int | None = self.manifest.facts["width"]
        return width

    def blocks(self, *, features: bool = False) -> Iterator[tuple[Head, Block]]:
        """The pictures with codes, at most some 65,000 at a time, each block with the head of its table.

        Args:
            features: whether a block has them; only where they were kept.

        Raises:
            BadInput: a table is gone or damaged, or was made anew since.
        """
        for head in self.heads:
            if self.tables.head(head.shard) != head:
                raise BadInput(
                    f"{self.tables.path(head.shard)} is missing, or not the table that {self.manifest.folder} lists: "
                    "encode the collection again"
                )
            for block in self.tables.blocks(head.shard, features=features):
                yield head, block

    @property
    def kind(self) -> Any:
        """Type of the codes."""
        return np.int16 if self.space.codebook_size <= 1 << 15 else np.int32

    def shape(self, *, features: bool) -> Shape:
        """Of a segment of all pictures.

        Args:
            features: whether it keeps the features, which the collection must have.
        """
        return Shape(len(self), self.space.levels, self.kind, self.width if features else None, None)

    def segment_blocks(self, unpacked: Path | None = None, *, features: bool) -> Iterator[SegmentBlock]:
        """The pictures with codes as a gallery has them.

        Args:
            unpacked: a folder in which they lie as files, each shard in a folder of its name; by default a picture's
                file is its name behind the address of its shard, where no program opens it.
            features: as in `blocks`.
        """
        for head, block in self.blocks(features=features):
            place = head.address.removeprefix(LOCAL) if unpacked is None else portable(unpacked / head.shard)
            pictures = [Picture(image, f"{place}/{file}") for image, file in zip(block.ids, block.files, strict=True)]
            yield SegmentBlock(block.codes, pictures, block.features, unknown(len(pictures)))


def read_collection(folder: Path) -> Collection:
    """Open a finished folder of `RQ-VAE.encode_shards`.

    Raises:
        BadInput: it is not finished, or damaged.
    """
    manifest = runs.read_manifest(folder, CODED_BY)
    place = manifest.facts["tables"]
    inside = folder / place if manifest.config["tables"] is None else place
    heads = [Head(**row) for _, row in read_json_lines(folder / SHARDS)]
    return Collection(manifest, Tables(str(inside)), heads)
