"""Brute-force two-tower search through faiss: the first row of every table."""

import time
from typing import NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from models.clip import encode_tokens, load_recorded, trim_padding
from models.compute import autocast, pick_device, pick_dtype
from tools.features import Features, Floats, normalized
from tools.recall import Ranks

SPEED_QUERIES = 512
BATCH = 64


class TwoTower(NamedTuple):
    """Results of two-tower search."""

    rows: NDArray[np.int64]
    """(queries, keep) pool rows, best first"""
    scores: Floats
    """(queries, keep) cosines"""


class FlatIndex:
    """Exact search by cosine over pictures (pictures, width), which are normalised and stored once."""

    def __init__(self, pool: Floats) -> None:
        faiss.cvar.distance_compute_blas_threshold = 1  # the shipped value never reaches BLAS
        self.index = faiss.IndexFlatIP(pool.shape[1])
        self.index.add(np.ascontiguousarray(normalized(pool)))

    def search(self, queries: Floats, *, keep: int) -> TwoTower:
        """The best pictures of queries (queries, width); equal scores by the lower row."""
        scores, rows = self.index.search(np.ascontiguousarray(normalized(queries)), min(keep, self.index.ntotal))
        order = np.lexsort((rows, -scores), axis=1)
        return TwoTower(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))


class QueryTower:
    """The text tower that queries of two-tower search go through, with its tokenizer, on a device.

    Args:
        features: whose model it is.
    """

    def __init__(self, features: Features, device: str | None = None) -> None:
        self.clip = load_recorded(features.manifest.facts)
        self.device = pick_device(device)
        self.dtype = pick_dtype("auto", self.device)
        self.clip.model.text.to(self.device)

    def encode(self, texts: list[str]) -> Floats:
        """Features (texts, width) of one batch."""
        with torch.inference_mode(), autocast(self.device, self.dtype):
            tokens = trim_padding(self.clip, self.clip.tokenizer(texts)).to(self.device)
            found: Floats = encode_tokens(self.clip, tokens).cpu().numpy()
        return found


def search_flat(queries: Floats, pool: Floats, *, keep: int) -> TwoTower:
    """Exact search of queries (queries, width) over pictures (pictures, width), once."""
    return FlatIndex(pool).search(queries, keep=keep)


def ranks_in(rows: NDArray[np.int64], targets: NDArray[np.int64], not_found: int) -> Ranks:
    """Rank from 1 of each query's target in its list of rows (queries, keep)."""
    hits = rows == targets[:, None]
    ranks: Ranks = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, not_found)
    return ranks


def queries_per_second(features: Features, texts: list[str], pool: Floats, *, device: str | None = None) -> float:
    """Speed of tokenising, encoding and searching up to 512 queries, in batches of 64, after one batch of warm-up."""
    tower, index = QueryTower(features, device), FlatIndex(pool)
    texts = sorted(texts[:: max(1, len(texts) // SPEED_QUERIES)][:SPEED_QUERIES], key=len)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    index.search(tower.encode(batches[0]), keep=10)
    began = time.monotonic()
    for batch in batches:
        index.search(tower.encode(batch), keep=10)
    return len(texts) / (time.monotonic() - began)
