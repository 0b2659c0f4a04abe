"""Features of pictures and captions: what `RQ-VAE.prepare_emb` and `RQ-VAE.train_heads` write and later stages read.

images.npy  (pictures, width) float32, in the order of captions.jsonl
texts.npy   (captions, width) float32, in the order of the captions in it
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .captions import Record, Split, query_owners, read_captions
from .command_line.command_names import script_of, scripts_for
from .errors import BadInput
from .files import read_array
from .runs import Manifest, fingerprint, read_manifest

TOWERS, HEADS = "RQ-VAE.prepare_emb", "RQ-VAE.train_heads"  # the commands that write features
IMAGES, TEXTS = "images.npy", "texts.npy"
TAKEN = (
    "embeddings"  # the manifest's fact: where vectors were taken from that nobody computed here; they are normalised
)
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


class Features(NamedTuple):
    """Memory-mapped features with the records they belong to."""

    images: Floats
    texts: Floats
    records: list[Record]
    owners: Rows
    """(captions,) row of each caption's picture."""
    manifest: Manifest

    def image_rows(self, split: Split) -> Rows:
        """Rows of a split's pictures."""
        return np.array([row for row, record in enumerate(self.records) if record.split == split], dtype=np.int64)

    def text_rows(self, split: Split) -> Rows:
        """Rows of a split's captions."""
        chosen = [row for row, owner in enumerate(self.owners) if self.records[owner].split == split]
        return np.array(chosen, dtype=np.int64)

    def captioned_rows(self, split: Split) -> Rows:
        """Rows of a split's pictures that have captions."""
        rows = self.image_rows(split)
        return rows[np.isin(rows, self.owners)]

    def draw_captions(self, pictures: Rows, generator: np.random.Generator) -> Rows:
        """One random caption row for each of `pictures`, which must have captions."""
        counts = np.bincount(self.owners, minlength=len(self.records))
        first = np.cumsum(counts) - counts
        drawn: Rows = first[pictures] + (generator.random(len(pictures)) * counts[pictures]).astype(np.int64)
        return drawn


def read_features(folder: Path, *, layer: str = "embedding") -> Features:
    """Read a finished feature folder and the captions it was made from.

    Args:
        layer: "embedding" for the shared space, "tower" for what the projection heads read.

    Raises:
        BadInput: not a finished feature folder, of the other layer, or the captions have changed since.
    """
    manifest = read_manifest(folder, TOWERS, HEADS)
    facts: dict[str, Any] = manifest.facts
    if facts["layer"] != layer:
        script = script_of(HEADS) if layer == "embedding" else f"{script_of(TOWERS)} --layer tower --overwrite"
        raise BadInput(f"{folder} holds {facts['layer']} features, {layer} features are needed: run {script}")
    captions = read_captions(Path(facts["captions"]))
    if captions.manifest.fingerprint != facts["captions_fingerprint"]:
        again = scripts_for(folder, manifest.command)
        raise BadInput(f"{facts['captions']} has changed since {folder} was made: run {again} --overwrite")
    images, texts = read_array(folder / IMAGES), read_array(folder / TEXTS)
    return Features(images, texts, captions.records, np.array(query_owners(captions.records), np.int64), manifest)


def encoder_of(manifest: Manifest) -> list[str | None]:
    """What tells the two-tower model of a finished feature folder from others: content on disk, or name and tag."""
    places = (manifest.facts["model"], manifest.facts["pretrained"])
    found = [fingerprint(Path(place)) if place and Path(place).exists() else place for place in places]
    of_file = found[1] != manifest.facts["pretrained"]  # which does not tell its activation; other models do
    return [*found, "quick_gelu"] if of_file and manifest.facts.get("activation") == "quick_gelu" else found


def refuse_other_encoder(features: Manifest, rqvae: Manifest) -> None:
    """Refuse features that a tokenizer was not trained on.

    Args:
        features, rqvae: of a finished feature folder, and of a finished tokenizer.

    Raises:
        BadInput: another two-tower model made them.
    """
    encoder = encoder_of(features)
    if rqvae.facts.get("encoder", encoder) != encoder:
        raise BadInput(
            f"{rqvae.folder} was trained on features of another two-tower model than those of {features.folder} "
            f"({features.facts['model']}): encode the pictures with that model ({script_of(TOWERS)})"
        )


def normalized(vectors: Floats) -> Floats:
    """Rows divided by their L2 norm; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Floats = np.divide(vectors, np.maximum(norms, np.finfo(np.float32).tiny))
    return result
