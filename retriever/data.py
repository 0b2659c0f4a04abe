"""The retriever's dataset: who asks for which picture, and the codes of all pictures.

pool.jsonl                    {"image", "file", "split"} a line per picture, in the order of codes.npy
train.jsonl, val.jsonl, test.jsonl  {"query", "picture", "caption"} a line a caption; `picture` is a row of the pool,
                              `caption` the row of that text in the features' texts.npy
codes.npy, latents.npy, codebooks.npy, guide.safetensors  as RQ-VAE.generate_codes wrote them

Pseudo queries, captions that were generated for pictures of the pool, lie in a folder of their own:
pseudo.jsonl                  {"image", "query", "source", "similarity"} a line a pseudo query
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models.guide import GUIDE_NAME, Guide, read_guide
from models.lengths import tell_overlong
from tools.captions import Split
from tools.errors import BadInput
from tools.features import Features, Floats, read_features
from tools.files import read_array, read_json_lines
from tools.runs import Manifest, read_manifest
from tools.vokens import VokenSpace

POOL = "pool.jsonl"
PSEUDO_QUERIES = "pseudo.jsonl"
GENERATED_BY = "retriever.pseudo_queries.generate"  # the command that writes them
TRAINED_BY = ("retriever.train", "retriever.train_stage2")
ARRAYS = ("codes.npy", "latents.npy", "codebooks.npy")
UNKNOWN = -1  # datasets of earlier versions do not say which row a caption has; all but pseudo queries do without


class Queries(NamedTuple):
    """Texts of one split and the pool row of the picture each asks for."""

    texts: list[str]
    pictures: NDArray[np.int64]
    captions: NDArray[np.int64]
    """Row of each text in the features' texts.npy."""


class Pairs(NamedTuple):
    """Captions to train on or to validate with, and the pool row of the picture each asks for."""

    texts: list[str]
    pictures: NDArray[np.int64]

    def some(self, chosen: NDArray[np.int64]) -> "Pairs":
        """A selection, by place."""
        return Pairs([self.texts[index] for index in chosen], self.pictures[chosen])


class RetrieverData(NamedTuple):
    """A finished `retriever.prepare` folder."""

    folder: Path
    images: list[str]
    files: list[str]
    splits: list[Split]
    codes: NDArray[np.int64]
    """(pictures, levels)"""
    space: VokenSpace
    manifest: Manifest

    @property
    def codebooks(self) -> NDArray[np.float32]:
        """(books, codebook_size, width)"""
        return read_array(self.folder / "codebooks.npy")

    @property
    def codebooks_hash(self) -> str:
        """What the codes mean: a retriever reads any dataset whose pictures the same tokenizer coded."""
        return self.manifest.outputs["codebooks.npy"]

    @property
    def latents(self) -> NDArray[np.float32]:
        """(pictures, width) what the codes quantise"""
        return read_array(self.folder / "latents.npy")

    @property
    def guide(self) -> Guide | None:
        """What steers a search by a two-tower model, with a weight of 0; None where the tokenizer gives none."""
        return read_guide(self.folder / GUIDE_NAME)

    @property
    def image_folder(self) -> Path:
        return Path(self.manifest.facts["images"])

    def rows(self, pool: str) -> NDArray[np.int64]:
        """Pool rows of a split's pictures, or of all pictures for "all"."""
        if pool == "all":
            return np.arange(len(self.images))
        return np.array([row for row, split in enumerate(self.splits) if split == pool], dtype=np.int64)

    def text_features(self, texts: Sequence[str], device: torch.device) -> Floats:
        """Two-tower features (texts, width): those of captions are known, those of other texts are computed.

        Raises:
            BadInput: the features are gone, or have changed.
        """
        features = self.features
        row_of = {text: row for row, text in enumerate(text for each in features.records for text in each.captions)}
        rows = np.array([row_of.get(text, UNKNOWN) for text in texts], dtype=np.int64)
        found = np.array(features.texts[np.maximum(rows, 0)])
        if others := list(dict.fromkeys(text for text, row in zip(texts, rows, strict=True) if row == UNKNOWN)):
            from models.clip import TextEncoder  # slow to load, and seldom needed

            encoder = TextEncoder.recorded(features.manifest.facts, device)
            tell_overlong(encoder, others, "queries without features")
            encoded = encoder.encode(others).cpu().numpy()
            place = {text: number for number, text in enumerate(others)}
            for row in np.flatnonzero(rows == UNKNOWN):
                found[row] = encoded[place[texts[int(row)]]]
        return found

    @property
    def features(self) -> Features:
        """What the pictures were tokenized from.

        Raises:
            BadInput: it is gone, or has changed.
        """
        return read_features(Path(self.manifest.facts["features"]))

    def queries(self, split: Split) -> Queries:
        """The captions of one split; the other splits' files are not opened."""
        path = self.folder / f"{split}.jsonl"
        rows = [row for _, row in read_json_lines(path)]
        return Queries(
            [row["query"] for row in rows],
            np.array([row["picture"] for row in rows], dtype=np.int64),
            np.array([row.get("caption", UNKNOWN) for row in rows], dtype=np.int64),
        )


def read_data(folder: Path) -> RetrieverData:
    """Read what `retriever.prepare` wrote.

    Raises:
        BadInput: the folder is not finished, or its parts do not fit together.
    """
    manifest = read_manifest(folder, "retriever.prepare")
    pool = [row for _, row in read_json_lines(folder / POOL)]
    codes = np.asarray(read_array(folder / "codes.npy"))
    if len(pool) != len(codes):
        raise BadInput(f"{folder}: {len(pool)} pictures in {POOL}, {len(codes)} in codes.npy: make it again")
    facts = manifest.facts
    return RetrieverData(
        folder=folder,
        images=[row["image"] for row in pool],
        files=[row["file"] for row in pool],
        splits=[row["split"] for row in pool],
        codes=codes,
        space=VokenSpace(facts["levels"], facts["codebook_size"], facts["shared"]),
        manifest=manifest,
    )


class Coded(Protocol):
    """Pictures with codes: a dataset, or the gallery."""

    @property
    def folder(self) -> Path: ...

    @property
    def codebooks_hash(self) -> str: ...


def read_retriever(folder: Path, data: Coded, *commands: str) -> Manifest:
    """Read the manifest of a trained retriever that is to search `data`.

    Args:
        commands: that may have trained it; by default those of either stage.

    Raises:
        BadInput: the folder is not finished, or its vokens stand for other codebooks.
    """
    trained = read_manifest(folder, *(commands or TRAINED_BY))
    if trained.facts["codebooks"] != data.codebooks_hash:
        raise BadInput(
            f"{folder} writes vokens of another tokenizer than {data.folder}: code the pictures with the RQ-VAE that "
            "the retriever was trained with (scripts/06_generate_codes.sh --overwrite), or train a retriever on them"
        )
    return trained


def read_pseudo_queries(folder: Path, data: RetrieverData) -> Pairs:
    """Read a finished folder of pseudo queries.

    Raises:
        BadInput: it is not finished, is empty, was made from other captions (whose splits may be others: a caption of a
            train picture of theirs may be one of test here), or names a picture that the dataset does not have.
    """
    manifest = read_manifest(folder, GENERATED_BY)
    if manifest.facts["captions_fingerprint"] != data.manifest.facts.get("captions_fingerprint"):
        raise BadInput(
            f"{folder} was made from other captions than {data.folder}: run scripts/08_generate_pseudo_query.sh "
            "--overwrite"
        )
    row_of = {image: row for row, image in enumerate(data.images)}
    texts, pictures = [], []
    for number, line in read_json_lines(folder / PSEUDO_QUERIES):
        if line["image"] not in row_of:
            raise BadInput(
                f"{folder / PSEUDO_QUERIES}, line {number}: {data.folder} has no picture {line['image']}: make the "
                "pseudo queries for this dataset (scripts/08_generate_pseudo_query.sh --overwrite)"
            )
        texts.append(line["query"])
        pictures.append(row_of[line["image"]])
    if not texts:
        raise BadInput(f"{folder} holds no pseudo queries: generate some, or train without --pseudo-queries")
    return Pairs(texts, np.array(pictures, dtype=np.int64))
