"""Recall worked out by hand, and the tie rule."""

import numpy as np
import pytest

from tools.recall import NOT_FOUND, code_rank, image_rank, report, search_ranks


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
