"""Recall, mean reciprocal rank and median rank, from the ranks at which the right pictures were found.

Ranks count from 1; `NOT_FOUND` stands for a picture outside the list that was kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CUTOFFS = (1, 5, 10)
NOT_FOUND = np.iinfo(np.int64).max
QUERY_BLOCK = 1024

Ranks = NDArray[np.int64]


class Report(NamedTuple):
    """Figures of one list of ranks; fractions, not percent."""

    queries: int
    recalls: dict[int, float]
    mrr: float
    """Mean of 1/rank, 0 for pictures not found."""
    median_rank: float | None
    """None when at least half of the pictures were not found."""

    def recall(self) -> dict[str, float]:
        """Recall by cutoff, as it goes into JSON: {"1": 0.389, "5": ..., "10": ...}."""
        return {str(cutoff): value for cutoff, value in self.recalls.items()}

    def rounded(self) -> dict[str, Any]:
        """All figures for a manifest."""
        recall = {name: round(value, 5) for name, value in self.recall().items()}
        return {"queries": self.queries, "recall": recall, "mrr": round(self.mrr, 5), "median_rank": self.median_rank}


def report(ranks: Ranks) -> Report:
    """Summarise ranks (queries,).

    >>> report(np.array([1, 3, NOT_FOUND])).recalls[5]
    0.6666666666666666
    """
    if not len(ranks):
        return Report(0, dict.fromkeys(CUTOFFS, 0.0), 0.0, None)
    found = ranks != NOT_FOUND
    recalls = {cutoff: float((ranks <= cutoff).mean()) for cutoff in CUTOFFS}
    mrr = float(np.where(found, 1.0 / np.where(found, ranks, 1), 0.0).mean())
    middle = np.sort(ranks)[[(len(ranks) - 1) // 2, len(ranks) // 2]]
    median = None if middle[1] == NOT_FOUND else float(middle.mean())
    return Report(len(ranks), recalls, mrr, median)


def clearly_better(ranks: Ranks, others: Ranks) -> bool:
    """Whether the mean recall at the cutoffs gains more than its standard error over the queries: on a few dozen of
    them, chance would choose."""
    cutoffs = np.array(CUTOFFS)
    gains = (ranks[:, None] <= cutoffs).mean(axis=1) - (others[:, None] <= cutoffs).mean(axis=1)
    return bool(gains.mean() > gains.std() / len(gains) ** 0.5)


def image_rank(ranked: Sequence[int], target: int) -> int:
    """Rank of picture `target` in a ranked list of pictures."""
    return ranked.index(target) + 1 if target in ranked else NOT_FOUND


def code_rank(ranked_codes: Sequence[Any], target_codes: Any) -> int:
    """Rank of `target_codes` among the distinct codes of a ranked list: the published measure.

    Pictures in a collision count as one, so that finding any of them counts as finding each.
    """
    distinct = list(dict.fromkeys(ranked_codes))
    return distinct.index(target_codes) + 1 if target_codes in distinct else NOT_FOUND


def search_ranks(queries: NDArray[Any], pool: NDArray[Any], targets: NDArray[Any]) -> Ranks:
    """Rank of each query's target by inner product with the whole pool.

    Ties go to the lower pool row, so that equal vectors never all count as found.

    Args:
        queries: (queries, width).
        pool: (pictures, width).
        targets: (queries,) rows of the pool.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    rows = np.arange(len(pool))
    for start in range(0, len(queries), QUERY_BLOCK):
        wanted = targets[start : start + QUERY_BLOCK, None]
        scores = queries[start : start + QUERY_BLOCK] @ pool.T
        own = np.take_along_axis(scores, wanted, axis=1)
        ahead = (scores > own) | ((scores == own) & (rows < wanted))
        ranks[start : start + QUERY_BLOCK] = ahead.sum(axis=1) + 1
    return ranks


def search_recall(queries: NDArray[Any], pool: NDArray[Any], targets: NDArray[Any]) -> Report:
    """Figures of brute-force search; arguments as in `search_ranks`."""
    return report(search_ranks(queries, pool, targets))
