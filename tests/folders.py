"""Run folders made by hand: what the stages leave, with random content, in milliseconds."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.rqvae import RqVae, RqVaeConfig
from retriever.gallery.compact import Codec
from retriever.gallery.gallery import COMMAND, FOLDERS, KEEPS_FEATURES, SEGMENTS, read_gallery
from retriever.gallery.pictures import LineStore
from retriever.gallery.publish import version_facts
from retriever.gallery.segments import SEGMENT, Block, shape_of_all, write_segment
from tools import runs
from tools.captions import FILE_NAME, SPLITS, Record, read_captions, write_captions
from tools.features import encoder_of
from tools.files import hash_file, write_array, write_json_lines

WIDTH, LEVELS, CODES = 6, 3, 4


@dataclass(frozen=True)
class Config:
    """A configuration that only says where to write, and what a reader of its manifest asks for."""

    output: Path
    overwrite: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def finished(
    folder: Path,
    command: str,
    write: Callable[[Path], object],
    *,
    facts: dict[str, Any],
    inputs: dict[str, Path] | None = None,
) -> Path:
    """A finished run folder of a command."""
    run = runs.begin(command, Config(folder), inputs=inputs or {})
    assert run is not None
    write(folder)
    run.finish(facts=facts)
    return folder


def captions(folder: Path, *, words: str = "a red circle") -> Path:
    """Six pictures with a caption each, two a split."""
    images = folder.parent / f"{folder.name}-images"
    images.mkdir(parents=True)
    records = []
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(images / f"{number}.png")
        text = f"{words} {number}"
        records.append(Record(f"{number}.png", f"{number}.png", SPLITS[number % 3], (text,)))
    return finished(
        folder,
        "tools.prepare_captions",
        lambda here: write_captions(here / FILE_NAME, records),
        facts={"images": str(images)},
    )


def features(folder: Path, of: Path, *, width: int = WIDTH, model: str = "ViT-X", layer: str = "embedding") -> Path:
    """Features of the pictures and captions of a folder of captions."""

    def write(here: Path) -> None:
        generator = np.random.default_rng(0)
        records = read_captions(of).records
        counts = {"images.npy": len(records), "texts.npy": sum(len(each.captions) for each in records)}
        for name, rows in counts.items():
            write_array(here / name, generator.normal(size=(rows, width)).astype(np.float32))

    fingerprint = runs.read_manifest(of, "tools.prepare_captions").fingerprint
    facts = {"captions": str(of), "captions_fingerprint": fingerprint, "layer": layer, "precision": "float32"}
    return finished(folder, "RQ-VAE.prepare_emb", write, facts={**facts, "model": model, "pretrained": "tag"})


def rqvae(folder: Path, of: Path, *, seed: int = 0, width: int = WIDTH) -> Path:
    """An untrained tokenizer for features."""

    def write(here: Path) -> None:
        model = RqVae(RqVaeConfig(width, 4, hidden=(5,), levels=LEVELS, codebook_size=CODES))
        generator = np.random.default_rng(seed)
        model.quantizer.codebooks.data.copy_(
            model.quantizer.codebooks.new_tensor(generator.normal(size=model.quantizer.codebooks.shape))
        )
        model.save_pretrained(here)

    encoder = encoder_of(runs.read_manifest(of, "RQ-VAE.prepare_emb"))
    facts = {"encoder": encoder, "levels": LEVELS, "codebook_size": CODES, "shared": False}
    return finished(folder, "RQ-VAE.train", write, facts=facts)


def codes(folder: Path, of: Path, tokenizer: Path) -> Path:
    """Codes of the pictures of a folder of features."""

    def write(here: Path) -> None:
        generator = np.random.default_rng(0)
        write_array(here / "codes.npy", generator.integers(0, CODES, size=(6, LEVELS)))
        write_array(here / "latents.npy", generator.normal(size=(6, 4)).astype(np.float32))
        books = RqVae.from_pretrained(tokenizer).quantizer.codebooks
        write_array(here / "codebooks.npy", books.detach().numpy())

    made_of = runs.read_manifest(of, "RQ-VAE.prepare_emb").facts
    shared = {name: made_of[name] for name in ("captions", "captions_fingerprint")}
    facts = {**shared, "levels": LEVELS, "codebook_size": CODES, "shared": False, "width": 4, "features": str(of)}
    inputs = {"features": of, "rqvae": tokenizer}
    return finished(folder, "RQ-VAE.generate_codes", write, facts=facts, inputs=inputs)


def retriever(folder: Path, dataset: Path, write: Callable[[Path], object] = lambda here: None) -> Path:
    """A retriever that writes the vokens of a dataset."""
    books = hash_file(dataset / "codebooks.npy")
    facts = {"codebooks": books, "setting": "inductive", "kind": "seq2seq"}
    return finished(folder, "retriever.train", write, facts=facts)


def ranked(folder: Path, dataset: Path) -> Path:
    """Ranked lists of all splits."""
    manifest = runs.read_manifest(dataset, "retriever.prepare")

    def write(here: Path) -> None:
        for number, split in enumerate(SPLITS):
            picture = {"picture": number, "caption": number, "ranked": [0, 1, 2], "scores": [-1.0, -2.0, -3.0]}
            write_json_lines(here / f"{split}-{split}.jsonl", [{"query": "a red circle", **picture}])

    kept = {name: manifest.facts[name] for name in ("features", "captions_fingerprint")}
    return finished(folder, "retriever.rank_splits", write, facts={**kept, "setting": "inductive"})


def tokens(folder: Path, of: Path) -> Path:
    """Image tokens of the pictures of a folder of captions."""

    def write(here: Path) -> None:
        generator = np.random.default_rng(0)
        write_array(here / "tokens.npy", generator.integers(0, 8, size=(6, 4)).astype(np.int32))
        write_array(here / "codebook.npy", generator.normal(size=(8, 4)).astype(np.float32))

    fingerprint = runs.read_manifest(of, "tools.prepare_captions").fingerprint
    facts = {"captions": str(of), "captions_fingerprint": fingerprint, "length": 4, "codebook_size": 8}
    return finished(folder, "reranker.convert", write, facts={**facts, "tokenizer": "patches"})


def as_earlier(folder: Path, *, contents: bool = True) -> Path:
    """Make an index that was just built what an earlier program would have left."""
    opened = read_gallery(folder)
    lines = [json.dumps(picture._asdict(), ensure_ascii=False).encode() + b"\n" for picture in opened.pictures()]
    version = (folder / "segment-000000").rename(folder / "version-000000")
    (version / "pictures.sqlite").unlink()
    (version / LineStore.TEXT).write_bytes(b"".join(lines))
    write_array(version / LineStore.LINES, np.cumsum([0, *map(len, lines)]))
    if contents:
        write_array(version / LineStore.CONTENTS, opened.read_contents(opened.rows))
    facts = {key: value for key, value in opened.facts.items() if key != SEGMENTS}
    runs.replace_outputs(opened.manifest, sorted(version.iterdir()), facts)
    return folder


def small_index(folder: Path, block: Block, codec: Codec | None = None) -> Path:
    """An index of some pictures, which no model made."""
    facts = {
        **version_facts(0, len(block.codes), {SEGMENT.format(0): len(block.codes)}),
        "levels": block.codes.shape[1],
        "codebooks": "none",
        KEEPS_FEATURES: block.features is not None,
        FOLDERS: [],
        "history": [],
    }
    return finished(
        folder,
        COMMAND,
        lambda here: write_segment(here, 0, shape_of_all(block, codec), iter([block]), tree=True),
        facts=facts,
    )
