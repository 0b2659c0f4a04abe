"""Ranked lists and the interpolation of their scores: files, ranks against a sort, shares that are chosen."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retriever.beam import RankedPictures
from retriever.rank_splits import gathered
from tools.errors import BadInput
from tools.files import read_json_lines
from tools.interpolation import STEPS, Choice, choose_weights, interpolated
from tools.ranked import NO_PICTURE, Packed, RankedLists, read_lists, reordered_ranks, write_lists
from tools.recall import CUTOFFS, NOT_FOUND, report

LINE: dict[str, Any] = {"query": "a red car", "caption": 17, "picture": 3, "ranked": [12, 3], "scores": [-1.2, -1.5]}


def lists_of(rows: list[list[int]], scores: list[list[float]], pictures: list[int]) -> RankedLists:
    texts = [f"query {number}" for number in range(len(rows))]
    captions = np.arange(len(rows), dtype=np.int64) + 100
    padded_rows, padded_scores = padded(rows, NO_PICTURE, np.int64), padded(scores, -np.inf, np.float32)
    return RankedLists(texts, captions, np.array(pictures, dtype=np.int64), padded_rows, padded_scores)


def padded(lists: Sequence[Sequence[float]], fill: float, dtype: type) -> NDArray[Any]:
    """Lists as an array, one by one."""
    array: NDArray[Any] = np.full((len(lists), max((len(one) for one in lists), default=0)), fill, dtype=dtype)
    for line, one in zip(array, lists, strict=True):
        line[: len(one)] = one
    return array


SOME = lists_of(
    [[12, 3, 40], [], [5], [7, 6]], [[-1.25, -1.5, -4.0], [], [-0.5], [-2.0, -2.0]], [3, 4, 5, 9]
)  # a list of three, none, one and two


def assert_equal(one: RankedLists, other: RankedLists) -> None:
    assert one.texts == other.texts
    for name in ("captions", "pictures", "rows", "scores"):
        first, second = getattr(one, name), getattr(other, name)
        assert first.dtype == second.dtype
        assert np.array_equal(first, second), name


@given(st.lists(st.lists(st.floats(-9, 9, width=32), max_size=5), max_size=6))
def test_packed_lists_come_out_padded(lists: list[list[float]]) -> None:
    packed = Packed("f")
    for one in lists:
        packed.append(one)
    expected = padded(lists, -np.inf, np.float32)
    found = packed.padded(-np.inf, np.float32)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)


def test_what_is_found_is_gathered_by_query() -> None:
    """Lists that are short, empty, or, where codes collide, longer than asked for, in the order of the search."""
    found = [([4, 2, 9, 7], [-0.5, -1.0, -1.0, -2.0]), ([], []), ([3], [-0.25])]
    ranking = [(place, RankedPictures(*found[place])) for place in (2, 0, 1)]
    for most, longest in ((3, 3), (10, 4)):
        rows, scores = gathered(ranking, 3, most)
        assert np.array_equal(rows, padded([each[:most] for each, _ in found], NO_PICTURE, np.int64))
        assert np.array_equal(scores, padded([each[:most] for _, each in found], -np.inf, np.float32))
        assert rows.shape == scores.shape == (3, longest)
        assert rows.dtype == np.int64
        assert scores.dtype == np.float32
    rows, scores = gathered([], 0, 5)
    assert rows.shape == scores.shape == (0, 0)


# Files


def test_short_lists_are_written_and_read_back(tmp_path: Path) -> None:
    write_lists(tmp_path / "x.jsonl", SOME)
    lines = [line for _, line in read_json_lines(tmp_path / "x.jsonl")]
    assert lines[0] == {
        "query": "query 0", "caption": 100, "picture": 3, "ranked": [12, 3, 40], "scores": [-1.25, -1.5, -4.0],
    }  # fmt: skip
    assert [line["ranked"] for line in lines] == [[12, 3, 40], [], [5], [7, 6]]
    assert_equal(read_lists(tmp_path / "x.jsonl"), SOME)
    empty = lists_of([[], []], [[], []], [1, 2])
    write_lists(tmp_path / "empty.jsonl", empty)
    assert_equal(read_lists(tmp_path / "empty.jsonl"), empty)
    assert read_lists(tmp_path / "empty.jsonl").rows.shape == (2, 0)


def test_scores_are_rounded_in_the_file_and_keep_their_order(tmp_path: Path) -> None:
    write_lists(tmp_path / "x.jsonl", lists_of([[1, 2, 3]], [[-0.123449, -0.123451, -1.0]], [2]))
    assert np.allclose(read_lists(tmp_path / "x.jsonl").scores, [[-0.1234, -0.1235, -1.0]])


def test_a_selection_and_the_best_of_each() -> None:
    two = SOME.some(np.array([3, 0]))
    assert two.texts == ["query 3", "query 0"]
    assert two.rows.tolist() == [[7, 6, NO_PICTURE], [12, 3, 40]]
    assert two.pictures.tolist() == [9, 3]
    best = SOME.first(1)
    assert best.rows.tolist() == [[12], [NO_PICTURE], [5], [7]]
    assert best.scores.shape == (4, 1)
    assert SOME.first(50).rows.shape == (4, 3)
    assert SOME.present.sum(axis=1).tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("key", list(LINE))
def test_a_missing_key_is_named_with_its_line(key: str, tmp_path: Path) -> None:
    path = tmp_path / "val-val.jsonl"
    lines = [LINE, {name: value for name, value in LINE.items() if name != key}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    with pytest.raises(BadInput) as raised:
        read_lists(path)
    assert (
        str(raised.value) == f"{path}, line 3: no {key!r} in it: run scripts/16_prepare_reranker_dataset.sh --overwrite"
    )


def test_lists_that_are_none_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "val-val.jsonl"
    path.write_text("\n")
    with pytest.raises(BadInput, match=r"val-val\.jsonl has no ranked lists: run scripts/16_prepare"):
        read_lists(path)
    path.write_text(json.dumps(LINE) + "\n" + json.dumps({**LINE, "scores": [-1.0]}) + "\n")
    with pytest.raises(BadInput, match=r"val-val\.jsonl, line 2: 2 pictures, 1 scores: run scripts/16_prepare"):
        read_lists(path)
    path.write_text(json.dumps(LINE) + "\n[3]\n")
    with pytest.raises(BadInput, match=r"val-val\.jsonl, line 2: expected a JSON object"):
        read_lists(path)
    with pytest.raises(BadInput, match=r"nowhere\.jsonl does not exist"):
        read_lists(tmp_path / "nowhere.jsonl")


# Ranks


def sorted_ranks(lists: RankedLists, scores: NDArray[np.floating]) -> list[int]:
    """Each list sorted by its scores, high to low, equal ones as they stood."""
    ranks = []
    for row, own, picture in zip(lists.rows.tolist(), scores.tolist(), lists.pictures.tolist(), strict=True):
        there = [(-score, place) for place, score in enumerate(own) if row[place] != NO_PICTURE]
        order = [row[place] for _, place in sorted(there)]
        ranks.append(order.index(picture) + 1 if picture in order else NOT_FOUND)
    return ranks


@st.composite
def ranked_lists(draw: st.DrawFn) -> tuple[RankedLists, NDArray[np.float64]]:
    """Lists of distinct pictures, and other scores of them, with many ties."""
    rows = draw(st.lists(st.lists(st.integers(0, 8), max_size=6, unique=True), min_size=1, max_size=5))
    few = st.sampled_from([-1.5, 0.0, 0.25, 1e4])
    own = [draw(st.lists(few, min_size=len(row), max_size=len(row))) for row in rows]
    others = [draw(st.lists(few, min_size=len(row), max_size=len(row))) for row in rows]
    pictures = draw(st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows)))
    fill = draw(st.sampled_from([-np.inf, 2e4, np.nan]))  # what stands behind a list's end does not count
    return lists_of(rows, own, pictures), padded(others, fill, np.float64)


@settings(max_examples=300, deadline=None)
@given(ranked_lists())
def test_ranks_are_those_of_a_sort(given: tuple[RankedLists, NDArray[np.float64]]) -> None:
    lists, scores = given
    assert reordered_ranks(lists, scores).tolist() == sorted_ranks(lists, scores)


def test_equal_scores_keep_the_retrievers_order() -> None:
    ranks = reordered_ranks(SOME, np.zeros(SOME.rows.shape))
    assert ranks.tolist() == [2, NOT_FOUND, 1, NOT_FOUND]
    assert reordered_ranks(SOME, SOME.scores).tolist() == [2, NOT_FOUND, 1, NOT_FOUND]
    assert reordered_ranks(SOME, -SOME.scores)[0] == 2
    last = SOME._replace(pictures=np.array([40, 4, 5, 6]))
    assert reordered_ranks(last, np.zeros(SOME.rows.shape)).tolist() == [3, NOT_FOUND, 1, 2]
    assert reordered_ranks(last, -last.scores).tolist() == [1, NOT_FOUND, 1, 2]


# Interpolation


def test_scores_are_weighted_and_summed() -> None:
    own = np.array([[-1.0, -2.0, -np.inf]], dtype=np.float32)
    others = {"features": np.array([[10.0, 30.0, -np.inf]]), "reranker": np.array([[4.0, -4.0, np.nan]])}
    total = interpolated(own, others, {"features": 0.25, "reranker": 0.5})
    assert total.tolist() == [[0.25 * -1 + 0.25 * 10 + 0.5 * 4, 0.25 * -2 + 0.25 * 30 + 0.5 * -4, -np.inf]]
    assert interpolated(own, others, {"features": 1.0}).tolist() == [[10.0, 30.0, -np.inf]]


@settings(max_examples=100, deadline=None)
@given(ranked_lists())
def test_no_weight_is_the_retrievers_order(given: tuple[RankedLists, NDArray[np.float64]]) -> None:
    lists, scores = given
    for weights in ({}, {"other": 0.0}):
        total = interpolated(lists.scores, {"other": scores}, weights)
        assert np.array_equal(total, lists.scores)


def made_lists(queries: int = 60, longest: int = 8) -> tuple[RankedLists, dict[str, NDArray[np.float64]]]:
    """Lists in the order of the retriever's noisy scores, two more kinds of noisy scores."""
    generator = np.random.default_rng(0)
    rows = np.stack([generator.permutation(30)[:longest] for _ in range(queries)])
    pictures = rows[np.arange(queries), generator.integers(0, longest, queries)]
    truth = 2.0 * (rows == pictures[:, None])
    own = truth + 1.5 * generator.normal(size=rows.shape)
    order = np.argsort(-own, axis=1)
    rows, own, truth = (np.take_along_axis(each, order, axis=1) for each in (rows, own, truth))
    others = {name: truth + spread * generator.normal(size=rows.shape) for name, spread in (("a", 1.0), ("b", 1.5))}
    texts = [""] * queries
    zeros = np.zeros(queries, dtype=np.int64)
    return RankedLists(texts, zeros, pictures, rows, own.astype(np.float32)), others


def mean_recall(lists: RankedLists, others: dict[str, NDArray[np.float64]], weights: dict[str, float]) -> float:
    ranks = np.array(sorted_ranks(lists, interpolated(lists.scores, others, weights)))
    return float(np.mean([(ranks <= cutoff).mean() for cutoff in CUTOFFS]))


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_the_shares_are_the_best_of_all(names: tuple[str, ...]) -> None:
    lists, every = made_lists()
    others = {name: every[name] for name in names}
    grid = {
        counts: mean_recall(lists, others, {name: count / STEPS for name, count in zip(names, counts, strict=True)})
        for counts in itertools.product(range(STEPS + 1), repeat=len(names))
        if sum(counts) <= STEPS
    }
    best = max(grid.values())
    choice = choose_weights(lists, others)
    assert choice.mean_recall == pytest.approx(best)
    counts = tuple(round(choice.weights[name] * STEPS) for name in names)
    assert grid[counts] == pytest.approx(best)
    assert sum(counts) == min(sum(each) for each, value in grid.items() if value == pytest.approx(best))
    assert 0 < sum(counts) < STEPS  # the optimum lies inside


def test_a_planted_optimum_is_found() -> None:
    """The other scores put the right picture ahead from a share of 0.35 on, and a wrong one from 0.6 on."""
    own, right, wrong = np.array([0.0, -1.0, -3.0]), 0.35, 0.6
    # behind `share`, the picture's lead share * gain outweighs what the retriever has it behind, (1 - share) * behind
    gain_right = (1 - right + 0.025) * 1.0 / (right - 0.025)
    gain_wrong = gain_right + (1 - wrong + 0.025) * 2.0 / (wrong - 0.025)
    lists = lists_of([[7, 3, 9]] * 2, [own.tolist()] * 2, [3, 3])
    others = {"other": np.array([[0.0, gain_right, gain_wrong]] * 2)}
    for count in range(STEPS + 1):
        share = count / STEPS
        first = int(np.argmax(interpolated(lists.scores, others, {"other": share})[0]))
        assert first == (0 if share < right - 0.01 else 1 if share < wrong - 0.01 else 2), share
    assert choose_weights(lists, others) == Choice({"other": right}, 1.0)


def test_of_equally_good_shares_the_smallest_are_chosen() -> None:
    lists, _ = made_lists()
    useless = {"a": np.zeros(lists.rows.shape), "b": np.zeros(lists.rows.shape)}
    assert choose_weights(lists, useless).weights == {"a": 0.0, "b": 0.0}  # no share of 1: then all would be equal
    assert choose_weights(lists, {}).weights == {}
    perfect = {"a": 1000.0 * (lists.rows == lists.pictures[:, None])}
    choice = choose_weights(lists, {**useless, **perfect})
    assert choice == Choice({"a": 1 / STEPS, "b": 0.0}, 1.0)
    weaker = {"a": 10.0 * (lists.rows == lists.pictures[:, None]), "b": perfect["a"]}  # perfect from larger shares on
    assert choose_weights(lists, {"a": weaker["a"]}).mean_recall == 1.0
    assert choose_weights(lists, weaker) == Choice({"a": 0.0, "b": 1 / STEPS}, 1.0)
    assert choose_weights(lists, dict(reversed(weaker.items()))) == Choice({"b": 1 / STEPS, "a": 0.0}, 1.0)


def test_shares_are_never_negative_nor_more_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    real = interpolated

    def watched(own: Any, others: Any, weights: dict[str, float]) -> Any:
        seen.append(weights)
        return real(own, others, weights)

    monkeypatch.setattr("tools.interpolation.interpolated", watched)
    lists, others = made_lists(3, 2)
    choose_weights(lists, others)
    assert len(seen) == (STEPS + 1) * (STEPS + 2) // 2
    assert all(min(each.values()) >= 0 and sum(each.values()) <= 1 + 1e-9 for each in seen)
    assert report(reordered_ranks(lists, lists.scores)).queries == 3
