"""Recall worked out by hand, and the tie rule."""

import numpy as np
import pytest

from tools import recall
from tools.recall import NOT_FOUND, code_rank, image_rank, report, search_ranks, search_recall


def test_report_by_hand() -> None:
    figures = report(np.array([1, 2, 6, NOT_FOUND]))
    assert figures.recalls == {1: 0.25, 5: 0.5, 10: 0.75}
    assert figures.mrr == pytest.approx((1 + 1 / 2 + 1 / 6) / 4)
    assert figures.median_rank == 4.0
    assert report(np.array([1, NOT_FOUND, NOT_FOUND])).median_rank is None
    assert report(np.array([], dtype=np.int64)).queries == 0


def test_image_rank_and_code_rank_differ_inside_a_collision() -> None:
    ranked, codes = [7, 3, 9], ["x", "x", "y"]
    assert image_rank(ranked, 3) == 2
    assert code_rank(codes, "x") == 1  # finding one of the two counts as finding each
    assert image_rank(ranked, 9) == 3
    assert code_rank(codes, "y") == 2
    assert image_rank(ranked, 1) == code_rank(codes, "z") == NOT_FOUND


def test_one_hot_search_finds_each_at_rank_one() -> None:
    vectors = np.eye(6, dtype=np.float32)
    assert search_ranks(vectors, vectors, np.arange(6)).tolist() == [1] * 6


def test_equal_scores_go_to_the_lower_row() -> None:
    pool = np.ones((4, 2), dtype=np.float32)
    query = np.ones((4, 2), dtype=np.float32)
    assert search_ranks(query, pool, np.arange(4)).tolist() == [1, 2, 3, 4]


def test_search_ranks_equal_a_sorted_list() -> None:
    generator = np.random.default_rng(0)
    queries, pool = generator.normal(size=(50, 8)), generator.normal(size=(30, 8))
    targets = generator.integers(0, 30, size=50)
    naive = [
        sorted(range(30), key=lambda row: (-float(query @ pool[row]), row)).index(target) + 1
        for query, target in zip(queries, targets, strict=True)
    ]
    assert search_ranks(queries, pool, targets).tolist() == naive


def test_a_rank_at_the_cutoff_counts() -> None:
    assert report(np.array([5, 6, 10, 11])).recalls == {1: 0.0, 5: 0.25, 10: 0.75}


@pytest.mark.parametrize(
    ("ranks", "median"),
    [
        ([3], 3.0),
        ([1, 4], 2.5),
        ([9, 1, 2], 2.0),
        ([1, NOT_FOUND], None),
        ([1, 2, NOT_FOUND], 2.0),
        ([8, 2, 4, 6], 5.0),
    ],
)
def test_the_median_lies_in_the_middle(ranks: list[int], median: float | None) -> None:
    assert report(np.array(ranks)).median_rank == median


def test_no_queries_give_nothing() -> None:
    assert report(np.array([], dtype=np.int64)) == (0, {1: 0.0, 5: 0.0, 10: 0.0}, 0.0, None)


def test_figures_are_rounded_for_a_manifest() -> None:
    figures = report(np.array([1, 3, 7, 7, NOT_FOUND, NOT_FOUND, 700]))
    assert figures.recall() == {"1": 1 / 7, "5": 2 / 7, "10": 4 / 7}
    assert figures.rounded() == {
        "queries": 7,
        "recall": {"1": 0.14286, "5": 0.28571, "10": 0.57143},
        "mrr": round((1 + 1 / 3 + 2 / 7 + 1 / 700) / 7, 5),
        "median_rank": 7.0,
    }


def test_search_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    queries, pool = generator.integers(-2, 3, size=(11, 2)), generator.integers(-2, 3, size=(9, 2))
    targets = generator.integers(0, 9, size=11)
    whole = search_ranks(queries, pool, targets)
    monkeypatch.setattr(recall, "QUERY_BLOCK", 4)
    assert search_ranks(queries, pool, targets).tolist() == whole.tolist()
    assert whole.dtype == np.int64
    for query, target, rank in zip(queries, targets, whole, strict=True):
        scores = (pool @ query).tolist()
        ahead = [row for row in range(9) if (-scores[row], row) < (-scores[target], target)]
        assert rank == len(ahead) + 1
    assert search_recall(queries, pool, targets) == report(whole)
