"""Brute-force two-tower search through faiss: the first row of every table."""

import time
from typing import NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from models.clip import encode_tokens, load_clip, trim_padding
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


def search_flat(queries: Floats, pool: Floats, *, keep: int) -> TwoTower:
    """Exact search by cosine; equal scores by the lower row."""
    faiss.cvar.distance_compute_blas_threshold = 1  # the shipped value never reaches BLAS
    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(np.ascontiguousarray(normalized(pool)))
    scores, rows = index.search(np.ascontiguousarray(normalized(queries)), min(keep, len(pool)))
    order = np.lexsort((rows, -scores), axis=1)
    return TwoTower(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))


def ranks_in(rows: NDArray[np.int64], targets: NDArray[np.int64], not_found: int) -> Ranks:
    """Rank from 1 of each query's target in its list of rows (queries, keep)."""
    hits = rows == targets[:, None]
    ranks: Ranks = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, not_found)
    return ranks


def queries_per_second(features: Features, texts: list[str], pool: Floats, *, device: str | None = None) -> float:
    """Speed of tokenising, encoding and searching up to 512 queries, in batches of 64, after one batch of warm-up."""
    facts = features.manifest.facts
    clip = load_clip(facts["model"], facts["pretrained"])
    on = pick_device(device)
    dtype = pick_dtype("auto", on)
    clip.model.text.to(on)
    texts = sorted(texts[:: max(1, len(texts) // SPEED_QUERIES)][:SPEED_QUERIES], key=len)
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]

    def answer(batch: list[str]) -> None:
        with torch.inference_mode(), autocast(on, dtype):
            tokens = trim_padding(clip, clip.tokenizer(batch)).to(on)
            search_flat(encode_tokens(clip, tokens).cpu().numpy(), pool, keep=10)

    answer(batches[0])
    began = time.monotonic()
    for batch in batches:
        answer(batch)
    return len(texts) / (time.monotonic() - began)
