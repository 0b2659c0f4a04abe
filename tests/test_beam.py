"""The beam search on a table of log-probabilities in place of a language model: every figure can be added up by hand.

tests/test_search.py holds the same search, with real language models, to Hugging Face's.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.decoding import Scoring
from retriever.beam import Beams, Candidates, RankedPictures, beam_search, best, children_of, expand
from retriever.index import build_index, to_device

CPU = torch.device("cpu")
SIZE = 5  # codes a level
STARTS = (100, 200, 300)  # token of each level's first code
Prefix = tuple[int, ...]


class Table:
    """A writer whose log-probabilities depend on the query, the level and all codes written so far.

    Args:
        grain: they are multiples of this; a coarse one makes equal scores frequent.
    """

    def __init__(self, grain: float = 1 / 1024) -> None:
        self.grain = grain
        self.head = self
        self.starts = STARTS
        self.prefixes: list[list[Prefix]] = []
        self.asked: list[str] = []
        self.steps = 0

    def begin(self, memory: Any) -> "Table":
        self.prefixes = [[()] for _ in memory.states]
        return self

    def open(self) -> Tensor:
        return torch.zeros(len(self.prefixes), 1, 1, device=CPU)

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        self.steps += 1
        self.prefixes = [
            [(*own[parent], token - STARTS[len(own[parent])]) for token, parent in zip(row, by, strict=True)]
            for own, row, by in zip(self.prefixes, tokens.tolist(), parents.tolist(), strict=True)
        ]
        return torch.zeros(*tokens.shape, 1, device=CPU)

    def row(self, query: int, prefix: Prefix, level: int, scoring: str) -> list[float]:
        seed = [query, level, scoring == "voken", *(code + 1 for code in prefix)]
        values = -np.random.default_rng(seed).integers(1, int(8 / self.grain), size=SIZE + 1) * self.grain
        return [float(value) for value in values]

    def end(self, query: int, prefix: Prefix) -> float:
        return self.row(query, prefix, len(STARTS), "full")[SIZE]

    def log_probabilities(self, states: Tensor, level: int, scoring: Scoring) -> Tensor:
        assert states.shape[:2] == (len(self.prefixes), len(self.prefixes[0]))
        self.asked.append(scoring)
        return torch.tensor(
            [
                [self.row(query, prefix, level, scoring)[:SIZE] for prefix in own]
                for query, own in enumerate(self.prefixes)
            ],
            device=CPU,
        )

    def end_log_probability(self, states: Tensor) -> Tensor:
        assert states.shape[:2] == (len(self.prefixes), len(self.prefixes[0]))
        return torch.tensor([[self.end(query, prefix) for prefix in own] for query, own in enumerate(self.prefixes)])


def search(writer: Table, rows: Sequence[Prefix], queries: int, **options: Any) -> Beams:
    memory: Any = SimpleNamespace(states=torch.zeros(queries, 1))
    written: Any = writer
    return beam_search(written, memory, to_device(build_index(np.array(rows)), CPU), **options)


def naive(
    writer: Table,
    rows: Sequence[Prefix],
    query: int,
    beams: int,
    scoring: str,
    *,
    score_end: bool,
    early_beams: int | None = None,
) -> list[tuple[float, Prefix]]:
    """Beam search over a set of sequences, one beam after the other; equal scores in the order of the codes."""
    levels = len(rows[0])
    found: list[tuple[float, Prefix]] = [(0.0, ())]
    for level in range(levels):
        reached = []
        for score, prefix in found:
            codes = sorted({row[level] for row in rows if row[:level] == prefix})
            values = writer.row(query, prefix, level, scoring)
            reached += [(score + values[code], (*prefix, code)) for code in codes]
        kept = early_beams if early_beams is not None and early_beams > beams and 2 * level + 1 < levels else beams
        found = sorted(reached, key=lambda each: (-each[0], each[1]))[:kept]
    if score_end:
        ended = [(score + writer.end(query, prefix), prefix) for score, prefix in found]
        found = sorted(ended, key=lambda each: (-each[0], each[1]))
    return found


def assert_naive(writer: Table, rows: Sequence[Prefix], queries: int, **options: Any) -> None:
    found = search(writer, rows, queries, **options)
    leaves = sorted(set(rows))
    settled = {"scoring": "full", "score_end": False, **options}
    assert found.leaves.dtype == torch.long
    assert found.leaves.shape[1] <= options["beams"]
    for query in range(queries):
        expected = naive(writer, rows, query, **settled)
        count = len(expected)
        assert [leaves[leaf] for leaf in found.leaves[query, :count].tolist()] == [codes for _, codes in expected]
        assert found.scores[query, :count].tolist() == [score for score, _ in expected]  # exact: all are binary
        assert found.scores[query, count:].tolist() == [-np.inf] * (found.scores.shape[1] - count)
    assert set(writer.asked) == {settled["scoring"]}
    assert writer.steps == len(rows[0]) - 1 + settled["score_end"]


CODES = st.lists(st.tuples(*[st.integers(0, SIZE - 1)] * 3), min_size=1, max_size=40)


@pytest.mark.parametrize(("scoring", "score_end"), [("full", False), ("full", True), ("voken", False)])
@settings(max_examples=40, deadline=None)
@given(rows=CODES, queries=st.integers(1, 3), beams=st.integers(1, 12), grain=st.sampled_from([1 / 1024, 4.0]))
def test_equals_a_search_with_lists(
    rows: list[Prefix], queries: int, beams: int, grain: float, scoring: Scoring, score_end: bool
) -> None:
    assert_naive(Table(grain), rows, queries, beams=beams, scoring=scoring, score_end=score_end)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("early_beams", [1, 6, 100])
def test_more_beams_at_the_first_half_of_the_levels(levels: int, early_beams: int) -> None:
    rows = [tuple(row) for row in np.random.default_rng(0).integers(0, SIZE, size=(60, levels)).tolist()]
    for score_end in (False, True):
        assert_naive(Table(), rows, 2, beams=3, early_beams=early_beams, score_end=score_end)


@pytest.mark.parametrize("levels", [1, 2])
def test_codes_of_one_or_two_levels(levels: int) -> None:
    rows = [tuple(row) for row in np.random.default_rng(0).integers(0, SIZE, size=(20, levels)).tolist()]
    for beams in (1, 3, 50):
        assert_naive(Table(), rows, 2, beams=beams)


def test_the_softmax_is_the_full_one_without_the_end_unless_told() -> None:
    writer = Table()
    search(writer, [(0, 1), (2, 3)], 1, beams=2)
    assert (writer.asked, writer.steps) == (["full", "full"], 1)


def test_the_end_token_needs_the_full_softmax() -> None:
    with pytest.raises(ValueError, match="end token") as refused:
        search(Table(), [(0, 1)], 1, beams=1, scoring="voken", score_end=True)
    assert str(refused.value) == "the softmax over vokens has no end token: score_end needs scoring='full'"


class Broken(Table):
    """Gives one value for one code of one query at one level."""

    def __init__(self, value: float, level: int, code: int = 0) -> None:
        super().__init__()
        self.value, self.level, self.code = value, level, code

    def log_probabilities(self, states: Tensor, level: int, scoring: Scoring) -> Tensor:
        values = super().log_probabilities(states, level, scoring)
        if level == self.level:
            values[-1, :, self.code] = self.value
        return values


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("code", [0, 4])  # the second is no picture's
def test_what_is_no_number_is_an_error(level: int, code: int) -> None:
    with pytest.raises(FloatingPointError) as refused:
        search(Broken(torch.nan, level, code), [(0, 0), (1, 1)], 2, beams=2)
    assert str(refused.value) == "the model's scores are not numbers: search in another --precision"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_a_best_score_without_bounds_is_an_error(value: float) -> None:
    with pytest.raises(FloatingPointError, match="another --precision"):
        search(Broken(value, 1), [(0, 0)], 2, beams=2)


def test_a_picture_that_cannot_be_written_is_no_error_beside_others() -> None:
    found = search(Broken(-torch.inf, 1), [(0, 0), (0, 1)], 1, beams=2)
    assert found.leaves.tolist() == [[1, 0]]
    assert found.scores[0, 1] == -torch.inf


def test_everything_is_made_on_the_device_of_the_queries() -> None:
    """And not on torch's default one."""
    codes = np.random.default_rng(0).integers(0, SIZE, size=(20, 3))
    memory, writer, levels = SimpleNamespace(states=torch.zeros(2, 1)), Table(), to_device(build_index(codes), CPU)
    rows: Any = [tuple(row) for row in codes.tolist()]
    with torch.device("meta"):
        found = beam_search(writer, memory, levels, beams=4)  # type: ignore[arg-type]
    assert found.leaves.tolist() == search(Table(), rows, 2, beams=4).leaves.tolist()


def test_gradients_are_not_kept() -> None:
    assert search(Table(), [(0, 1)], 1, beams=1).scores.is_inference()


def test_children_by_hand() -> None:
    """Nodes 0, 1 and 2 have 1, 3 and 1 children; the beams stand at 2 and 1."""
    level = to_device(build_index(np.array([[0, 4], [1, 0], [1, 2], [1, 3], [2, 1]])), CPU)[1]
    table = torch.arange(10.0).view(1, 2, 5)
    found = children_of(torch.tensor([[2, 1]]), torch.tensor([[-0.5, 0.0]]), table, level)
    assert found.nodes.tolist() == [[4, 4, 4, 1, 2, 3]]
    assert found.scores.tolist() == [[0.5, -torch.inf, -torch.inf, 5.0, 7.0, 8.0]]
    assert found.parents.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert found.codes.tolist() == [[1, 1, 1, 0, 2, 3]]
    assert found.codes.dtype == torch.long


def test_as_many_columns_as_the_widest_of_the_beams() -> None:
    """Not as the widest node of the level."""
    level = to_device(build_index(np.array([[0, 4], [1, 0], [1, 2], [1, 3], [2, 1]])), CPU)[1]
    found = children_of(torch.tensor([[0, 2]]), torch.zeros(1, 2), torch.zeros(1, 2, 5), level)
    assert found.nodes.tolist() == [[0, 4]]


def test_the_best_come_in_order_and_equal_ones_by_node() -> None:
    scores = torch.tensor([[-1.0, 0.5, -0.0, 0.0, -torch.inf, 0.5, -1.0, -2.5, torch.inf]])
    nodes = torch.tensor([[6, 9, 4, 2, 1, 3, 0, 7, 8]])
    others = torch.arange(9)[None]
    found = best(Candidates(nodes, scores, others, others + 100), 20)
    assert found.nodes.tolist() == [[8, 3, 9, 2, 4, 0, 6, 7, 1]]
    assert found.parents.tolist() == [[8, 5, 1, 3, 2, 6, 0, 7, 4]]
    assert found.codes.tolist() == [[108, 105, 101, 103, 102, 106, 100, 107, 104]]
    assert best(Candidates(nodes, scores, others, others), 3).scores.tolist() == [[torch.inf, 0.5, 0.5]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.integers(1, 20))
def test_any_scores_are_sorted(values: list[float], beams: int) -> None:
    nodes = np.random.default_rng(len(values)).permutation(2**31 - 1 - np.arange(len(values)))
    scores, row = torch.tensor([values]), torch.from_numpy(nodes)[None]
    found = best(Candidates(row, scores, row, row), beams)
    expected = sorted(zip(values, nodes.tolist(), strict=True), key=lambda each: (-each[0], each[1]))[:beams]
    assert found.scores[0].tolist() == [score for score, _ in expected]
    assert found.nodes[0].tolist() == [node for _, node in expected]


def test_leaves_become_pictures_by_hand() -> None:
    index = build_index(np.array([[1], [0], [1], [2]]))
    found = Beams(
        torch.tensor([[1, 0, 2], [0, 0, 0], [2, 1, 0]]),
        torch.tensor([[-1.0, -2.0, -3.0], [-1.5, -torch.inf, -torch.inf], [-0.5, -1.0, -torch.inf]]),
    )
    assert expand(found, index, keep=2) == [
        RankedPictures([0, 2, 1], [-1.0, -1.0, -2.0]),
        RankedPictures([1], [-1.5]),
        RankedPictures([3, 0, 2], [-0.5, -1.0, -1.0]),
    ]
    assert [ranked.rows for ranked in expand(found, index, keep=1)] == [[0, 2], [1], [3]]
    assert [ranked.rows for ranked in expand(found, index, keep=9)] == [[0, 2, 1, 3], [1], [3, 0, 2]]


def test_a_query_without_pictures_has_an_empty_list() -> None:
    nothing = Beams(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[-torch.inf], [-1.0]]))
    assert expand(nothing, build_index(np.array([[0]])), keep=1) == [
        RankedPictures([], []),
        RankedPictures([0], [-1.0]),
    ]
