"""The search against two oracles: Hugging Face `generate` with a Python trie, and scoring every picture of the pool."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import MT5Config, MT5ForConditionalGeneration

from models.arithmetic import Arithmetic
from models.decoding import Scoring, Writer, make_writer
from models.voken_lm import VokenLM
from retriever.beam import Beams, Candidates, RankedPictures, beam_search, best, expand
from retriever.index import build_index, to_device
from tests.oracle import dictionary_trie, exhaustive, generate
from tests.tiny import tiny_encoder_decoder, tiny_llama, tiny_t5
from tools.vokens import VokenSpace

Codes = NDArray[np.int64]

QUERIES = ["a red circle", "drawing of a small blue square", "green"]
SEPARATE, SHARED = VokenSpace(3, 6, shared=False), VokenSpace(4, 5, shared=True)
WIDE = VokenSpace(4, 16, shared=True)


def gated_t5(folder: Path, space: VokenSpace) -> VokenLM:
    return tiny_t5(folder, space, feed_forward="gated-gelu", tied=False)


def mt5(folder: Path, space: VokenSpace) -> VokenLM:
    return tiny_t5(
        folder, space, feed_forward="gated-gelu", tied=False, family=(MT5Config, MT5ForConditionalGeneration)
    )


MODELS: dict[str, Callable[[Path, VokenSpace], VokenLM]] = {
    "t5": tiny_t5,
    "t5-gated": gated_t5,
    "mt5": mt5,
    "encoder-decoder": tiny_encoder_decoder,
    "llama": tiny_llama,
}


@pytest.fixture(
    scope="module",
    params=[(kind, space) for kind in MODELS for space in (SEPARATE, SHARED)],
    ids=lambda value: f"{value[0]}-{'shared' if value[1].shared else 'separate'}",
)
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VokenLM:
    kind, space = request.param
    return MODELS[kind](tmp_path_factory.mktemp(kind), space)


@pytest.fixture(scope="module", params=MODELS)
def wide_lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VokenLM:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param), WIDE)


def random_codes(space: VokenSpace, pictures: int, seed: int = 0) -> Codes:
    """Codes with collisions: half of the pictures repeat others'."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, space.codebook_size, size=(pictures, space.levels))
    codes[pictures // 2 :] = codes[generator.integers(0, pictures, size=pictures - pictures // 2)]
    return codes


def find(writer: Writer, codes: Codes, queries: list[str], **options: Any) -> Beams:
    memory = writer.encode(writer.lm.tokenize(queries))
    return beam_search(writer, memory, to_device(build_index(codes), writer.lm.device), **options)


def search(lm: VokenLM, codes: Codes, **options: Any) -> list[RankedPictures]:
    found = find(make_writer(lm), codes, QUERIES, **options)
    return expand(found, build_index(codes), keep=10**6)


def assert_equals_generate(
    lm: VokenLM, codes: Codes, *, beams: int, scoring: Scoring, score_end: bool, queries: list[str] = QUERIES
) -> None:
    """The same sequences in the same order, and scores within 1e-4; `generate` repeats itself where beams are left."""
    found = find(make_writer(lm), codes, queries, beams=beams, scoring=scoring, score_end=score_end)
    sequences = np.unique(codes, axis=0)
    expected = generate(
        lm,
        dictionary_trie(lm, codes, score_end=score_end),
        lm.tokenize(queries),
        beams=beams,
        scoring=scoring,
        score_end=score_end,
    )
    for leaves, scores, oracle in zip(found.leaves.tolist(), found.scores.tolist(), expected, strict=True):
        real = [place for place, score in enumerate(oracle.scores) if score > -1e8]
        mine = [place for place, score in enumerate(scores) if np.isfinite(score)]
        assert len(mine) == min(beams, len(sequences)) == len(real)
        assert [tuple(sequences[leaves[place]].tolist()) for place in mine] == [oracle.codes[place] for place in real]
        if beams > 1:
            assert [scores[place] for place in mine] == pytest.approx(
                [oracle.scores[place] for place in real], abs=1e-4
            )


@pytest.mark.parametrize(("scoring", "score_end"), [("full", True), ("full", False), ("voken", False)])
@pytest.mark.parametrize("beams", [1, 4, 10])
def test_equals_generate_with_a_python_trie(lm: VokenLM, beams: int, scoring: Scoring, score_end: bool) -> None:
    assert_equals_generate(lm, random_codes(lm.space, 60), beams=beams, scoring=scoring, score_end=score_end)


@pytest.mark.parametrize("pictures", [1, 3, 3000])
@pytest.mark.parametrize("beams", [10, 100])
def test_equals_generate_from_one_picture_to_thousands(wide_lm: VokenLM, pictures: int, beams: int) -> None:
    codes = random_codes(WIDE, pictures)
    assert_equals_generate(wide_lm, codes, beams=beams, scoring="full", score_end=True, queries=QUERIES[:2])


@pytest.mark.parametrize(("scoring", "score_end"), [("full", True), ("full", False), ("voken", False)])
@pytest.mark.parametrize("pictures", [1, 2, 40])
def test_wide_beams_equal_exhaustive_scoring(lm: VokenLM, pictures: int, scoring: Scoring, score_end: bool) -> None:
    codes = random_codes(lm.space, pictures)
    scores = exhaustive(lm, codes, lm.tokenize(QUERIES), scoring=scoring, score_end=score_end)
    for row, ranked in enumerate(search(lm, codes, beams=200, scoring=scoring, score_end=score_end)):
        assert sorted(ranked.rows) == list(range(pictures))
        assert ranked.scores == pytest.approx(scores[row][ranked.rows].tolist(), abs=1e-4)
        assert ranked.scores == sorted(ranked.scores, reverse=True)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 15), min_size=4, max_size=4), min_size=1, max_size=40),
    beams=st.integers(1, 12),
)
def test_every_result_is_a_picture_of_the_pool_and_none_comes_twice(
    wide_lm: VokenLM, rows: list[list[int]], beams: int
) -> None:
    codes = np.array(rows, dtype=np.int64)
    for ranked in search(wide_lm, codes, beams=beams, scoring="voken"):
        assert len(set(ranked.rows)) == len(ranked.rows)
        assert set(ranked.rows) <= set(range(len(codes)))
        assert len({tuple(codes[row]) for row in ranked.rows}) == min(beams, len(np.unique(codes, axis=0)))


def test_inside_a_collision_the_order_of_the_pool_counts(lm: VokenLM) -> None:
    codes = np.tile(np.arange(lm.space.levels) % 2, (5, 1)).astype(np.int64)
    for ranked in search(lm, codes, beams=3):
        assert ranked.rows == [0, 1, 2, 3, 4]
        assert len(set(ranked.scores)) == 1


@pytest.mark.parametrize("beams", [3, 100])
def test_equal_scores_go_to_the_smaller_codes(lm: VokenLM, beams: int) -> None:
    codes = random_codes(lm.space, 30)
    matrix = lm.model.get_output_embeddings().weight
    kept = matrix.detach().clone()
    order = np.lexsort(codes.T[::-1])
    distinct = len(np.unique(codes[order], axis=0)[:beams])
    try:
        with torch.no_grad():
            matrix[lm.first_voken : lm.first_voken + len(lm.space.tokens)] = 0.0  # every voken is equally likely
        for ranked in search(lm, codes, beams=beams, scoring="voken"):
            assert ranked.rows == order.tolist()[: len(ranked.rows)]
            assert len({tuple(codes[row]) for row in ranked.rows}) == distinct
    finally:
        with torch.no_grad():
            matrix.copy_(kept)


def test_the_best_are_taken_in_order_and_ties_by_node() -> None:
    scores = torch.tensor([[-1.0, 0.5, -0.0, 0.0, -torch.inf, 0.5, -1.0]])
    nodes = torch.tensor([[6, 9, 4, 2, 1, 3, 0]])
    found = best(Candidates(nodes, scores, nodes, nodes), 7)
    assert found.nodes.tolist() == [[3, 9, 2, 4, 0, 6, 1]]
    assert best(Candidates(nodes, scores, nodes, nodes), 2).scores.tolist() == [[0.5, 0.5]]


def test_a_batch_gives_what_each_query_alone_gives(lm: VokenLM) -> None:
    codes = random_codes(lm.space, 40)
    writer = make_writer(lm)
    together = find(writer, codes, QUERIES, beams=5)
    for row, query in enumerate(QUERIES):
        alone = find(writer, codes, [query], beams=5)
        assert alone.leaves[0].tolist() == together.leaves[row].tolist()
        assert alone.scores[0].tolist() == pytest.approx(together.scores[row].tolist(), abs=1e-4)


@pytest.mark.parametrize(("arithmetic", "most"), [("bf16", 0.5), ("int8", 0.6)])
def test_lower_arithmetic_stays_near(lm: VokenLM, arithmetic: Arithmetic, most: float) -> None:
    codes = np.unique(random_codes(lm.space, 12), axis=0)
    exact, near = (
        find(make_writer(lm, kind), codes, QUERIES, beams=len(codes), scoring="voken") for kind in ("fp32", arithmetic)
    )
    by_leaf = [found.scores.gather(1, found.leaves.argsort(dim=1))[:, : len(codes)] for found in (exact, near)]
    assert 0 < (by_leaf[0] - by_leaf[1]).abs().max() < most * lm.space.levels


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "fp16", "int8"])
def test_a_writer_leaves_the_model_as_it_is(lm: VokenLM, arithmetic: Arithmetic) -> None:
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    make_writer(lm, arithmetic)
    for name, value in lm.model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name


def test_the_end_token_is_not_in_the_softmax_over_vokens(lm: VokenLM) -> None:
    with pytest.raises(ValueError, match="has no end token"):
        search(lm, random_codes(lm.space, 4), beams=2, scoring="voken", score_end=True)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_an_error(lm: VokenLM, value: float) -> None:
    matrix = lm.model.get_output_embeddings().weight
    kept = matrix.detach().clone()
    try:
        with torch.no_grad():
            matrix[lm.first_voken] = value  # of a single voken
        with pytest.raises(FloatingPointError, match="another --precision"):
            search(lm, random_codes(lm.space, 4), beams=2, scoring="full")
    finally:
        with torch.no_grad():
            matrix.copy_(kept)


def test_a_softmax_that_overflows_is_an_error(lm: VokenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer(lm)
    monkeypatch.setattr(writer.head, "others", lambda rows: torch.full((len(rows), 3), torch.inf))
    with pytest.raises(FloatingPointError, match="another --precision"):
        find(writer, random_codes(lm.space, 4), QUERIES, beams=2, scoring="full")
