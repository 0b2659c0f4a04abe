"""Two-tower search at the sizes the language models are timed at: CLIP's text tower, then faiss."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from .crossover import TwoTower
from .shapes import TextTower, captions, clip_tokens, text_tower
from .timing import Timing, interleave

Floats = NDArray[np.float32]

WIDTH = 768
CLUSTERS = 2000
SHIPPED_THRESHOLD = int(faiss.cvar.distance_compute_blas_threshold)
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 16, 60, 64
IVF_PROBES = 32
FOUND = 10
SYSTEMS = (
    ("fp32, 77 tokens", "naive flat"),
    ("fp32, trimmed", "flat"),
    ("fp32, trimmed", "IVF"),
    ("fp32, trimmed", "HNSW"),
    ("bf16, trimmed", "flat"),
    ("bf16, trimmed", "HNSW"),
)  # what is compared with generation


class Index(NamedTuple):
    """One way to search a pool."""

    parameters: str

    search: Callable[[Floats], NDArray[np.int64]]
    """(queries, 768) to (queries, 10) rows of the pool"""
    build_seconds: float
    bytes_a_picture: float
    recall: float
    """Share of the exact ten that it finds"""

    def figures(self) -> dict[str, Any]:
        """What a table says of it beside its speed."""
        return {
            "parameters": self.parameters or "-",
            "build s": round(self.build_seconds, 1),
            "bytes a picture": round(self.bytes_a_picture),
            f"recall@{FOUND} of exact": round(self.recall, 3),
        }


def clustered_vectors(count: int, *, seed: int) -> Floats:
    """Unit vectors (count, 768) around common centres, as features are."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
    vectors = np.empty((count, WIDTH), dtype=np.float32)
    for start in range(0, count, 50_000):
        block = vectors[start : start + 50_000]
        block[:] = centres[generator.integers(CLUSTERS, size=len(block))]
        block += generator.standard_normal(block.shape, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def build_indices(pool: int, queries: Floats, *, threads: int) -> dict[str, Index]:
    """Flat search as faiss ships it and through BLAS, IVF and HNSW; built with `threads`, searched with one."""
    vectors = clustered_vectors(pool, seed=1)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors)
    exact = _search(flat, 1)(queries)
    found = {
        "flat as shipped": Index("", _search(flat, SHIPPED_THRESHOLD), 0.0, 4.0 * WIDTH, 1.0),
        "flat through BLAS": Index("", _search(flat, 1), 0.0, 4.0 * WIDTH, 1.0),
    }
    if torch.cuda.is_available():
        on_device = Index("a matrix product on the GPU", _device_search(vectors), 0.0, 4.0 * WIDTH, 1.0)
        found = dict.fromkeys(found, on_device)
    lists = int(4 * pool**0.5)
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(WIDTH), WIDTH, lists, faiss.METRIC_INNER_PRODUCT)
    inverted.nprobe, inverted.cp.min_points_per_centroid = min(IVF_PROBES, lists), 1
    linked = faiss.IndexHNSWFlat(WIDTH, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    linked.hnsw.efConstruction, linked.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
    approximate: dict[str, tuple[Any, str, float]] = {
        "IVF": (inverted, f"{lists} lists, {inverted.nprobe} probed", 8.0),
        "HNSW": (linked, f"{HNSW_LINKS} links, ef {HNSW_BUILD}/{HNSW_SEARCH}", 4.0 * 2 * HNSW_LINKS),
    }
    for name, (index, parameters, extra) in approximate.items():
        faiss.omp_set_num_threads(threads)
        began = time.monotonic()
        index.train(vectors[:: max(1, pool // (40 * lists))])
        index.add(vectors)
        seconds = time.monotonic() - began
        search = _search(index, 1)
        recall = float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(search(queries), exact, strict=True)]))
        found[name] = Index(parameters, search, seconds, 4.0 * WIDTH + extra, recall)
    return found


def two_tower_systems(
    encoders: dict[tuple[str, int], float], searches: dict[tuple[str, int], dict[int, float]]
) -> list[TwoTower]:
    """Encoders joined with indices: naive, then tuned.

    Args:
        encoders: seconds a query by (encoder, batch).
        searches: seconds a query by pool size, by (index, batch).
    """
    systems = []
    for batch in sorted({batch for _, batch in encoders}):
        shipped, blas = searches["flat as shipped", batch], searches["flat through BLAS", batch]
        by_index = {
            "naive flat": shipped,
            "flat": {pool: min(shipped[pool], blas[pool]) for pool in shipped},
            "IVF": searches["IVF", batch],
            "HNSW": searches["HNSW", batch],
        }
        for encoder, index in SYSTEMS:
            seconds = encoders[encoder, batch]
            systems.append(TwoTower(f"{encoder}, {index}", batch, seconds, by_index[index], "flat" in index))
    return systems


def encoder_timings(device: torch.device, batches: list[int], *, repeats: int) -> dict[tuple[str, int], Timing]:
    """Seconds of the text tower for batches of captions, naive (77 tokens) and trimmed, by (name, batch)."""
    towers = {
        "fp32, 77 tokens": TextTower(text_tower("fp32", device), trimmed=False),
        "fp32, trimmed": TextTower(text_tower("fp32", device, tuned=True), trimmed=True),
        "bf16, trimmed": TextTower(text_tower("bf16", device, tuned=True), trimmed=True),
    }
    result: dict[tuple[str, int], Timing] = {}
    for batch in batches:
        tokens = clip_tokens(captions(batch)).to(device)
        calls = {name: _encoding(tower, tokens) for name, tower in towers.items()}
        result |= {(name, batch): timing for name, timing in interleave(calls, repeats=repeats).items()}
    return result


def _encoding(tower: TextTower, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tower.encode(tokens)


def _device_search(vectors: Floats) -> Callable[[Floats], NDArray[np.int64]]:
    """Exact search on the GPU, the vectors already there."""
    pool = torch.from_numpy(vectors).cuda()

    def search(queries: Floats) -> NDArray[np.int64]:
        scores = torch.from_numpy(queries).cuda() @ pool.T
        rows: NDArray[np.int64] = scores.topk(min(FOUND, len(pool)), dim=1).indices.cpu().numpy()
        return rows

    return search


def _search(index: Any, threshold: int) -> Callable[[Floats], NDArray[np.int64]]:
    def search(queries: Floats) -> NDArray[np.int64]:
        faiss.omp_set_num_threads(1)
        faiss.cvar.distance_compute_blas_threshold = threshold
        rows: NDArray[np.int64] = index.search(queries, min(FOUND, index.ntotal))[1]
        return rows

    return search
