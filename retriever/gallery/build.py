"""Build the index that search reads, from the dataset's pictures (retriever/gallery/gallery.py).

In:  a `retriever.prepare` folder, and the `RQ-VAE.train` folder that coded its pictures.
Out: `<output>/segment-000000/`; retriever.gallery.add, retriever.gallery.remove and retriever.gallery.sync add others.
Command: python -m retriever.gallery.build --dataset DIR --rqvae DIR --output DIR
"""

from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from tools import runs
from tools.captions import FILE_NAME, portable
from tools.command_line.commands import run_command
from tools.command_line.options import RunOptions
from tools.errors import BadInput
from tools.features import Floats, read_features

from ..data import RetrieverData, read_data
from .compact import stored_features, train_codec
from .contents import Contents, read_contents
from .gallery import FOLDERS, KEEPS_FEATURES, Folder, model_content
from .pictures import Picture
from .publish import clear, entry, version_facts
from .segments import Block, shape_of_all, write_segment


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Whose pictures can be found."""

    dataset: Path
    """Run folder of retriever.prepare."""
    rqvae: Path
    """Run folder of RQ-VAE.train, the tokenizer that coded the dataset; pictures added later are coded by it too."""
    keep_features: bool = True
    """Keep the pictures' features too, 2 bytes per number, by which search reorders what it finds."""
    compact_features: int | None = None
    """Keep them in so many bytes a picture, by product quantisation; docs/search.md has what that costs."""
    overwrite: bool = False
    """Throw away what the output folder holds, pictures added since included, and start again."""


def encoder_facts(data: RetrieverData, rqvae: Path) -> dict[str, Any]:
    """How the dataset's pictures were encoded and tokenized: what adding pictures must repeat.

    Raises:
        BadInput: the tokenizer is not the dataset's, or something has changed since the dataset was made.
    """
    codes = runs.read_manifest(runs.unchanged_input(data.manifest, "codes"), "RQ-VAE.generate_codes")
    content = runs.fingerprint(runs.read_manifest(rqvae, "RQ-VAE.train").folder)
    if content != codes.inputs["rqvae"]["fingerprint"]:
        raise BadInput(
            f"{rqvae} is not the RQ-VAE that coded {data.folder}: give the one of its codes "
            f"({codes.inputs['rqvae']['path']}), or run scripts/06_generate_codes.sh --overwrite and "
            "scripts/07_prepare_retriever_dataset.sh --overwrite"
        )
    return {
        "clip": clip_facts(runs.unchanged_input(codes, "features")),
        "rqvae": {"path": portable(rqvae), "content": content},
        "resolve_collisions": codes.config["resolve_collisions"],
    }


def clip_facts(features: Path) -> dict[str, Any]:
    """Which two-tower model made a feature folder, and its content, for a model on disk.

    Raises:
        BadInput: the model has changed since.
    """
    manifest = runs.read_manifest(features, "RQ-VAE.prepare_emb", "RQ-VAE.train_heads")
    if "model" in manifest.inputs:
        runs.unchanged_input(manifest, "model")
    model, pretrained = manifest.facts["model"], manifest.facts["pretrained"]
    assert manifest.facts["layer"] == "embedding", f"codes were made of {manifest.facts['layer']} features"
    place = portable(Path(model)) if Path(model).is_dir() else model
    kept = {key: manifest.facts[key] for key in ("activation",) if key in manifest.facts}
    return {"model": place, "pretrained": pretrained, **kept, "content": model_content(model, pretrained)}


def dataset_features(data: RetrieverData) -> Floats:
    """Features (pictures, width) of the dataset's pictures, in the order of codes.

    Raises:
        BadInput: they are gone, or of other pictures.
    """
    folder = Path(data.manifest.facts["features"])
    images = read_features(folder).images
    if len(images) != len(data.codes):
        raise BadInput(
            f"{folder} has features of {len(images)} pictures, {data.folder} has {len(data.codes)}: run "
            "scripts/06_generate_codes.sh --overwrite and scripts/07_prepare_retriever_dataset.sh --overwrite"
        )
    return images


def dataset_contents(data: RetrieverData) -> Contents:
    """What the files of the dataset's pictures hold; unknown where one has changed since its captions were read."""
    features = runs.read_manifest(Path(data.manifest.facts["features"]), "RQ-VAE.prepare_emb", "RQ-VAE.train_heads")
    captions = Path(features.facts["captions"]) / FILE_NAME
    before = captions.stat().st_mtime_ns if captions.is_file() else 0
    return read_contents((data.image_folder / file for file in data.files), before=before)


def main(config: Config) -> None:
    data = read_data(config.dataset)
    if not data.images:
        raise BadInput(f"{config.dataset} has no pictures: an index holds at least one")
    encoder = encoder_facts(data, config.rqvae)
    features = dataset_features(data) if config.keep_features else None
    run = runs.begin("retriever.gallery.build", config, inputs={"dataset": config.dataset, "rqvae": config.rqvae})
    if run is None:
        return
    clear(run.folder)  # of what a killed run left
    files = (str(data.image_folder / file) for file in data.files)
    pictures = list(starmap(Picture, zip(data.images, files, strict=True)))
    codec = train_codec(features, config.compact_features) if features is not None and config.compact_features else None
    kept = None if features is None else stored_features(features, codec)
    block = Block(data.codes, pictures, kept, dataset_contents(data))
    written = write_segment(run.folder, 0, shape_of_all(block, codec), iter([block]), tree=True)
    run.finish(
        facts={
            **version_facts(0, len(data.images), {written[0].parent.name: len(data.images)}),
            **data.space._asdict(),
            "codebooks": data.codebooks_hash,
            **encoder,
            KEEPS_FEATURES: config.keep_features,
            FOLDERS: [Folder(str(data.image_folder), prefix="")._asdict()],
            "history": [entry(added=len(data.images), removed=0, source=portable(config.dataset))],
        }
    )
    print(f"{len(data.images):,} pictures can be found -> {run.folder}")


if __name__ == "__main__":
    run_command(main, Config)
