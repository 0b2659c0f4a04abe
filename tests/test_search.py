"""The search against two oracles: Hugging Face `generate` with a Python trie, and scoring every picture of the pool."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from models.voken_lm import VokenLM
from retriever.beam import RankedPictures, beam_search, expand, to_device
from retriever.trie import build_trie
from tests.tiny import tiny_encoder_decoder, tiny_t5
from tools.vokens import VokenSpace

QUERIES = ["a red circle", "drawing of a small blue square", "green"]
SPACES = [VokenSpace(3, 6, shared=False), VokenSpace(4, 5, shared=True)]


@pytest.fixture(
    scope="module", params=[(kind, space) for kind in ("t5", "encoder-decoder") for space in SPACES], ids=str
)
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VokenLM:
    kind, space = request.param
    build = tiny_t5 if kind == "t5" else tiny_encoder_decoder
    return build(tmp_path_factory.mktemp(kind), space)


def random_codes(space: VokenSpace, pictures: int, seed: int = 0) -> NDArray[np.int64]:
    """Codes with collisions: half of the pictures repeat others'."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, space.codebook_size, size=(pictures, space.levels))
    codes[pictures // 2 :] = codes[generator.integers(0, pictures, size=pictures - pictures // 2)]
    return codes


def search(lm: VokenLM, codes: NDArray[np.int64], *, beams: int, score_end: bool) -> list[RankedPictures]:
    trie = build_trie(codes)
    memory = lm.encode(lm.tokenize(QUERIES))
    found = beam_search(lm, memory, to_device(trie, lm.device), beams=beams, score_end=score_end)
    return expand(found, trie, keep=10**6)


def exhaustive(lm: VokenLM, codes: NDArray[np.int64], *, score_end: bool) -> Tensor:
    """Score of every picture for every query, (queries, pictures), one full forward pass each."""
    rows = []
    with torch.inference_mode():
        for query in QUERIES:
            memory = lm.encode(lm.tokenize([query] * len(codes)))
            log_probabilities = lm(memory, torch.from_numpy(codes)).log_softmax(dim=-1)
            ids = lm.token_ids(torch.from_numpy(codes)).unsqueeze(2)
            scores = log_probabilities[:, :-1].gather(2, ids).squeeze(2).sum(dim=1)
            rows.append(scores + log_probabilities[:, -1, lm.end] if score_end else scores)
    return torch.stack(rows)


def generate(lm: VokenLM, codes: NDArray[np.int64], query: str, beams: int) -> list[tuple[tuple[int, ...], float]]:
    """The published way: `generate` and a dictionary trie with the end token in it."""
    allowed: dict[tuple[int, ...], set[int]] = {}
    for sequence in lm.token_ids(torch.from_numpy(codes)).tolist():
        tokens = [*sequence, lm.end]
        for length in range(len(tokens)):
            allowed.setdefault(tuple(tokens[:length]), set()).add(tokens[length])
    source = torch.tensor(lm.tokenize([query]))
    output: Any = lm.model.generate(
        input_ids=source,
        attention_mask=torch.ones_like(source),
        decoder_start_token_id=lm.start,
        eos_token_id=lm.end,
        pad_token_id=lm.model.config.pad_token_id,
        num_beams=beams,
        num_return_sequences=beams,
        early_stopping=True,
        length_penalty=0.0,
        max_new_tokens=lm.space.levels + 1,
        prefix_allowed_tokens_fn=lambda _, prefix: sorted(allowed.get(tuple(prefix[1:].tolist()), {lm.end})),
        output_scores=True,
        return_dict_in_generate=True,
    )
    sequences = output.sequences[:, 1 : lm.space.levels + 1] - lm.level_offsets
    scores = [0.0] if beams == 1 else output.sequences_scores.tolist()  # greedy search keeps no scores
    return [(tuple(row), score) for row, score in zip(sequences.tolist(), scores, strict=True)]


@pytest.mark.parametrize("beams", [1, 4, 10])
def test_equals_generate_with_a_python_trie(lm: VokenLM, beams: int) -> None:
    codes = random_codes(lm.space, 60)
    trie = build_trie(codes)
    first_of = {tuple(codes[trie.pictures_of(leaf)[0]]): leaf for leaf in range(len(trie.leaf_offsets) - 1)}
    memory = lm.encode(lm.tokenize(QUERIES))
    found = beam_search(lm, memory, to_device(trie, lm.device), beams=beams, score_end=True)
    for row, query in enumerate(QUERIES):
        expected = generate(lm, codes, query, beams)
        assert found.leaves[row].tolist() == [first_of[sequence] for sequence, _ in expected]
        if beams > 1:
            assert found.scores[row].tolist() == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("score_end", [False, True])
@pytest.mark.parametrize("pictures", [1, 2, 40])
def test_wide_beams_equal_exhaustive_scoring(lm: VokenLM, pictures: int, score_end: bool) -> None:
    codes = random_codes(lm.space, pictures)
    scores = exhaustive(lm, codes, score_end=score_end)
    for row, ranked in enumerate(search(lm, codes, beams=200, score_end=score_end)):
        assert sorted(ranked.rows) == list(range(pictures))
        assert ranked.scores == pytest.approx(scores[row][ranked.rows].tolist(), abs=1e-4)
        assert ranked.scores == sorted(ranked.scores, reverse=True)


def test_inside_a_collision_the_order_of_the_pool_counts(lm: VokenLM) -> None:
    codes = np.tile(np.arange(lm.space.levels) % 2, (5, 1)).astype(np.int64)
    for ranked in search(lm, codes, beams=3, score_end=False):
        assert ranked.rows == [0, 1, 2, 3, 4]
        assert len(set(ranked.scores)) == 1


def test_equal_scores_go_to_the_smaller_codes(lm: VokenLM) -> None:
    codes = random_codes(lm.space, 30)
    rows = slice(lm.first_voken, lm.first_voken + len(lm.space.tokens))
    matrices: list[Any] = [lm.model.get_output_embeddings() or lm.model.decoder.get_output_embeddings()]
    kept = matrices[0].weight.detach().clone()
    try:
        with torch.no_grad():
            matrices[0].weight[rows] = 0.0  # every voken is as likely as every other
        order = np.lexsort(codes.T[::-1])
        for ranked in search(lm, codes, beams=100, score_end=False):
            assert ranked.rows == order.tolist()
    finally:
        with torch.no_grad():
            matrices[0].weight.copy_(kept)


def test_a_batch_gives_what_each_query_alone_gives(lm: VokenLM) -> None:
    codes = random_codes(lm.space, 40)
    trie = build_trie(codes)
    together = search(lm, codes, beams=5, score_end=False)
    for row, query in enumerate(QUERIES):
        memory = lm.encode(lm.tokenize([query]))
        alone = expand(beam_search(lm, memory, to_device(trie, lm.device), beams=5), trie, keep=10**6)[0]
        assert alone.rows == together[row].rows
        assert alone.scores == pytest.approx(together[row].scores, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=30))
def test_the_trie_holds_exactly_the_pool(levels: int, rows: list[list[int]]) -> None:
    codes = np.array(rows, dtype=np.int64)[:, :levels]
    trie = build_trie(codes)
    walked: list[tuple[int, ...]] = [()]
    for level in trie.levels:
        walked = [
            (*prefix, int(code))
            for node, prefix in enumerate(walked)
            for code in level.codes[level.offsets[node] : level.offsets[node + 1]]
        ]
    assert walked == sorted({tuple(row) for row in codes.tolist()})
    for leaf, sequence in enumerate(walked):
        assert trie.pictures_of(leaf).tolist() == [i for i, row in enumerate(codes.tolist()) if tuple(row) == sequence]
    assert trie.widest == [int(np.diff(level.offsets).max()) for level in trie.levels]


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        build_trie(np.zeros((0, 4), dtype=np.int64))
