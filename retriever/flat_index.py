"""Exact search by cosine over all pictures of a pool: faiss on a CPU, one matrix product and a top-k on a GPU.

Both give the same lists: best first, and of equal scores the lower row. A matrix product may give two equal pictures
scores that differ in the last bit, though. `tools.recall.search_ranks`, their oracle, is what recall is measured with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.features import Floats, normalized

ROW_BITS = 32  # of a sort key; the score is above them
SCORES_AT_ONCE = 2**26


class Nearest(NamedTuple):
    """Pictures found for some queries."""

    rows: NDArray[np.int64]
    """(queries, keep) pool rows, best first"""
    scores: Floats
    """(queries, keep) cosines"""


class FaissIndex:
    """Search on the CPU over pictures (pictures, width), which are normalised and stored once."""

    def __init__(self, pool: Floats) -> None:
        import faiss  # here, and not above: a GPU does without it

        self.index = faiss.IndexFlatIP(pool.shape[1])
        self.index.add(np.ascontiguousarray(normalized(pool)))

    def search(self, queries: Floats, *, keep: int) -> Nearest:
        """The best pictures of queries (queries, width)."""
        asked, pictures = np.ascontiguousarray(normalized(queries)), self.index.ntotal
        keep = min(keep, pictures)
        with matrix_products():
            found = self._ordered(asked, min(keep + 1, pictures))
            cut = found.scores[:, keep - 1] == found.scores[:, -1]  # of these faiss keeps any
            if keep < pictures and cut.any():
                whole = self._ordered(asked[cut], pictures)
                found.rows[cut], found.scores[cut] = whole.rows[:, : keep + 1], whole.scores[:, : keep + 1]
        return Nearest(found.rows[:, :keep], found.scores[:, :keep])

    def _ordered(self, asked: Floats, keep: int) -> Nearest:
        scores, rows = self.index.search(asked, keep)
        order = np.lexsort((rows, -scores), axis=1)
        return Nearest(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))


class TorchIndex:
    """The same on a device of torch."""

    def __init__(self, pool: Floats, device: torch.device | str) -> None:
        self.pool = torch.from_numpy(normalized(np.asarray(pool))).to(device)

    @torch.inference_mode()
    def search(self, queries: Floats, *, keep: int) -> Nearest:
        """The best pictures of queries (queries, width)."""
        asked = torch.from_numpy(normalized(queries)).to(self.pool.device)
        keep = min(keep, len(self.pool))
        blocks = asked.split(max(1, SCORES_AT_ONCE // max(1, len(self.pool))))
        found = [best_first(block @ self.pool.T, keep) for block in blocks]
        rows, scores = (torch.cat(each).cpu().numpy() for each in zip(*found, strict=True))
        return Nearest(rows, scores)


def flat_index(pool: Floats, device: torch.device) -> FaissIndex | TorchIndex:
    """The search over pictures (pictures, width) that is the faster one on a device."""
    return TorchIndex(pool, device) if device.type == "cuda" else FaissIndex(pool)


def best_first(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Columns of the `keep` best of scores (queries, pictures) fp32, and these scores, both (queries, keep).

    `topk` promises nothing about equal scores. So it sorts whole numbers of which no two are equal: the score's bits,
    which for floats above zero are in the order of the numbers, and below them the column.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: of minus zero the sum is zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    last = 2**ROW_BITS - 1
    keys = (ordered << ROW_BITS) + (last - torch.arange(scores.shape[1], device=scores.device))
    columns = last - (keys.topk(keep, dim=1).values & last)
    return columns, scores.gather(1, columns)


@contextmanager
def matrix_products() -> Iterator[None]:
    """Inside it faiss compares batches of any size through BLAS; the size from which it does so is a global of faiss,
    whose shipped value no batch of queries reaches."""
    import faiss

    shipped = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = shipped
