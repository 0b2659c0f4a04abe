"""What an index loses that keeps its features in a few bytes a picture (retriever/gallery/compact.py).

In:  a finished feature folder, and a `retriever.rank_splits` folder of ranked lists.
Out: a table, printed: bytes a picture, and recall on one split of brute-force two-tower search and of the lists
     re-ranked by the features with their share in `--share`.
Command: python -m benchmarks.compact --features RQ-VAE/output/emoji/04_train_heads --lists DIR --share 0.25
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retriever.gallery.compact import stored_features, train_codec
from tools.captions import Split
from tools.command_line.commands import run_command
from tools.features import Features, Floats, normalized, read_features
from tools.interpolation import COSINE_SCALE, interpolated
from tools.logs import table
from tools.ranked import NO_PICTURE, RankedLists, read_lists, reordered_ranks
from tools.recall import Report, report
from tools.two_tower import two_tower_recall


@dataclass(frozen=True)
class Config:
    """What is measured."""

    features: Path
    """Run folder of RQ-VAE.prepare_emb or RQ-VAE.train_heads."""
    lists: Path
    """Run folder of retriever.rank_splits."""
    share: float
    """Of the features in the order of the lists, as reranker.test chose it."""
    bytes: tuple[int, ...] = (64, 32, 16, 8)
    """Sizes that are tried besides halves."""
    split: Split = "val"
    """Whose captions ask for its pictures."""


def reordered(lists: RankedLists, features: Features, pictures: Floats, share: float) -> Report:
    """Figures of lists that are re-ranked by the cosines with pictures (pictures, width)."""
    texts = normalized(features.texts[lists.captions])
    cosines = np.einsum("qw,qpw->qp", texts, pictures[np.where(lists.rows == NO_PICTURE, 0, lists.rows)])
    scores = interpolated(lists.scores, {"features": COSINE_SCALE * cosines}, {"features": share})
    return report(reordered_ranks(lists, scores))


def main(config: Config) -> None:
    features = read_features(config.features)
    lists = read_lists(config.lists / f"{config.split}-{config.split}.jsonl")
    captions, pool = features.text_rows(config.split), features.image_rows(config.split)
    rows: list[dict[str, Any]] = []
    for size in (None, *config.bytes):
        codec = None if size is None else train_codec(np.asarray(features.images), size)
        stored = stored_features(np.asarray(features.images), codec)
        pictures = (stored if codec is None else codec.decode(stored)).astype(np.float32)
        figures = {
            "two-tower": two_tower_recall(features, captions, pool, pictures=pictures),
            "re-ranked": reordered(lists, features, pictures, config.share),
        }
        row: dict[str, Any] = {"features": "halves" if size is None else "product-quantised", "bytes": stored[0].nbytes}
        for name, each in figures.items():
            row |= {f"{name} R@{k}": f"{100 * value:.1f}" for k, value in each.recalls.items()}
        rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    run_command(main, Config)
