"""Build the index that search reads from a collection's tables of codes, in bounded memory.

In:  a `RQ-VAE.encode_shards` folder.
Out: as retriever.gallery.build writes; pictures that share all codes are found together, under one leaf of the tree.
Command: python -m retriever.gallery.build_from_tables --collection DIR --output DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import runs
from tools.captions import portable
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput

from .build import clip_facts
from .collection import Collection, read_collection
from .gallery import COMMAND, FOLDERS, KEEPS_FEATURES
from .publish import clear, entry, version_facts
from .segments import write_segment


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Which collection can be found."""

    collection: Path
    """Run folder of RQ-VAE.encode_shards."""
    unpacked: Path | None = None
    """Folder in which the pictures lie as files, each shard in a folder of its name, to show what is found."""
    keep_features: bool | None = None
    """Keep the pictures' features, where the collection has them; by default, where it has them."""


def facts_of(collection: Collection) -> dict[str, Any]:
    """How the pictures were encoded and tokenized: what adding pictures must repeat.

    Raises:
        BadInput: a model has changed since.
    """
    rqvae = runs.unchanged_input(collection.manifest, "rqvae")
    return {
        **collection.space._asdict(),
        "codebooks": collection.manifest.outputs["codebooks.npy"],
        "clip": clip_facts(runs.unchanged_input(collection.manifest, "features")),
        "rqvae": {"path": portable(rqvae), "content": runs.fingerprint(rqvae)},
        "resolve_collisions": False,
    }


def main(config: Config) -> None:
    collection = read_collection(config.collection)
    if not len(collection):
        raise BadInput(f"{config.collection} has no pictures with codes: an index holds at least one")
    if config.keep_features and collection.width is None:
        raise BadInput(f"{config.collection} has no features: encode it with --keep-features, or leave them out here")
    keeps = collection.width is not None and config.keep_features is not False
    facts = facts_of(collection)
    run = runs.begin(COMMAND, config, inputs={"collection": config.collection})
    if run is None:
        return
    clear(run.folder)  # of what a killed run left
    blocks = collection.segment_blocks(config.unpacked, features=keeps)
    written = write_segment(run.folder, 0, collection.shape(features=keeps), blocks, tree=True)
    run.finish(
        facts={
            **version_facts(0, len(collection), {written[0].parent.name: len(collection)}),
            **facts,
            KEEPS_FEATURES: keeps,
            FOLDERS: [],
            "history": [entry(added=len(collection), removed=0, source=portable(config.collection))],
        }
    )
    print(f"{len(collection):,} pictures can be found -> {run.folder}")


if __name__ == "__main__":
    run_command(main, Config)
