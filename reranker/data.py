"""What the reranker reads: every picture's image tokens, and the retriever's ranked lists.

tokens.npy    (pictures, length) int32, in the order of captions.jsonl      reranker.convert
codebook.npy  (codebook_size, width) what each token stands for
<split>-<pool>.jsonl  ranked lists (tools/ranked.py)                        retriever.rank_splits
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.guide import GUIDE_NAME, read_guide
from models.hubness import Hubness
from models.scorer import ImageTokens
from tools.captions import Record, read_captions
from tools.errors import BadInput
from tools.files import read_array
from tools.ranked import RankedLists, read_lists
from tools.runs import Manifest, read_manifest

TOKENS, CODEBOOK = "tokens.npy", "codebook.npy"


class PictureTokens(NamedTuple):
    """A finished `reranker.convert` folder."""

    tokens: NDArray[np.integer]
    """(pictures, images.length)"""
    codebook: NDArray[np.float32]
    """(images.size, width)"""
    images: ImageTokens
    records: list[Record]
    manifest: Manifest


class Lists(NamedTuple):
    """A finished `retriever.rank_splits` folder."""

    manifest: Manifest

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.facts

    def read(self, split: str, pool: str) -> RankedLists:
        """The lists of one split's queries over one pool.

        Raises:
            BadInput: there are none.
        """
        path = self.manifest.folder / f"{split}-{pool}.jsonl"
        if not path.is_file():
            raise BadInput(
                f"{self.manifest.folder} has no {split} lists: run scripts/16_prepare_reranker_dataset.sh --overwrite"
            )
        return read_lists(path)

    @property
    def hubness(self) -> Hubness | None:
        """What the retriever's guide takes off cosines; None where it has no guide."""
        guide = read_guide(self.manifest.folder / GUIDE_NAME)
        return None if guide is None else guide.hubness

    def test_pools(self) -> list[str]:
        """Pools that the test queries were ranked over, in order."""
        return [str(pool) for pool in self.manifest.config["pools"]]


def read_tokens(folder: Path) -> PictureTokens:
    """Read what `reranker.convert` wrote.

    Raises:
        BadInput: the folder is not finished, or the captions have changed since.
    """
    manifest = read_manifest(folder, "reranker.convert")
    captions = read_captions(Path(manifest.facts["captions"]))
    if captions.manifest.fingerprint != manifest.facts["captions_fingerprint"]:
        raise BadInput(f"{manifest.facts['captions']} has changed since {folder} was made: make it again")
    images = ImageTokens(manifest.facts["length"], manifest.facts["codebook_size"])
    return PictureTokens(
        np.asarray(read_array(folder / TOKENS)), read_array(folder / CODEBOOK), images, captions.records, manifest
    )


def read_ranked(folder: Path, captions_fingerprint: str | None = None) -> Lists:
    """Open what `retriever.rank_splits` wrote.

    Raises:
        BadInput: it is not finished, or ranks other pictures than those of the captions.
    """
    manifest = read_manifest(folder, "retriever.rank_splits")
    if captions_fingerprint not in (None, manifest.facts["captions_fingerprint"]):
        raise BadInput(
            f"{folder} ranks pictures of other captions than the image tokens are of: make both from one set"
        )
    return Lists(manifest)
