"""The final order of a list: the retriever's scores, the features' and the reranker's, weighted and summed.

All three are log-probabilities of the pictures of a list, up to a constant a query that no order depends on: the
retriever's by its nature, cosines times CLIP's scale as CLIP's softmax reads them, the reranker's as its list-wise loss
does. Weights are shares, at least 0 and 1 in all; the retriever has what the others leave.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ranked import RankedLists, reordered_ranks
from .recall import report

COSINE_SCALE = 100.0  # of CLIP's logits at the end of its training (Radford et al. 2021, section 2.5)
STEPS = 20  # shares are multiples of 1 / STEPS

Scores = NDArray[np.floating]


class Choice(NamedTuple):
    """The weights that did best."""

    weights: dict[str, float]
    """Share of each score but the retriever's."""
    mean_recall: float
    """Mean of recall at 1, 5 and 10."""


def interpolated(own: Scores, others: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """The weighted sum of the retriever's scores and others of the same shape; -inf stays where there is no picture."""
    present = np.isfinite(own)
    total = (1.0 - sum(weights.values())) * np.where(present, own, 0.0)
    for name, weight in weights.items():
        total = total + weight * np.where(present, others[name], 0.0)
    return np.where(present, total, -np.inf)


def choose_weights(lists: RankedLists, others: Mapping[str, Scores]) -> Choice:
    """The shares with the highest mean recall on these lists; of equally good ones the smallest.

    Args:
        others: name -> (queries, longest) scores of the lists' pictures.
    """
    best = None
    for weights in sorted(_shares(list(others)), key=lambda shares: sum(shares.values())):
        recalls = report(reordered_ranks(lists, interpolated(lists.scores, others, weights))).recalls
        mean = sum(recalls.values()) / len(recalls)
        if best is None or mean > best.mean_recall:
            best = Choice(weights, mean)
    assert best is not None  # all shares may be 0
    return best


def _shares(names: list[str]) -> Iterator[dict[str, float]]:
    """Every way to give each name a multiple of 1 / STEPS, 1 in all at most."""

    def counts(left: int, places: int) -> Iterator[list[int]]:
        if not places:
            yield []
            return
        for count in range(left + 1):
            yield from ([count, *rest] for rest in counts(left - count, places - 1))

    for each in counts(STEPS, len(names)):
        yield {name: count / STEPS for name, count in zip(names, each, strict=True)}
