"""What a report measures anew: recall by beams and by the size of the pool, and speed beside two-tower search.

The queries are captions of val, drawn once by a seed: models were chosen on val, and test is kept for the final tables.
Pools grow: each holds the pictures of the one before.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.clip import TextEncoder
from models.decoding import Scoring, Writer
from models.guide import Guide
from tools.errors import BadInput
from tools.features import Features, Floats
from tools.recall import CUTOFFS, Ranks
from tools.recall import report as summarize
from tools.two_tower import two_tower_recall

from ..beam import beam_search, expand
from ..data import UNKNOWN, Queries, RetrieverData
from ..flat_index import flat_index
from ..index import build_index, to_device
from ..queries import LiveQueries
from ..retrieve import needs_features, ranks_of, search_queries
from ..training import WEIGHTS
from ..two_tower import encoded

SIZES = tuple(number * 10**power for power in range(2, 8) for number in (1, 3))  # 100, 300, 1,000, ...
BATCH = 64
KEEP = max(CUTOFFS)
TWO_TOWER = "two-tower"

Rows = NDArray[np.int64]


class Searching(NamedTuple):
    """How a retriever is searched with."""

    beams: int
    scoring: Scoring
    score_end: bool


class System(NamedTuple):
    """A trained retriever, ready to write."""

    name: str
    writer: Writer
    searching: Searching
    guide: Guide | None = None
    """With the weight that val chose; None where the retriever has none."""


class Figure(NamedTuple):
    """One measured point."""

    system: str
    x: float
    """Beams, pictures in the pool, or the guide's weight."""
    queries: int
    recall: dict[int, float]

    def row(self, x: str) -> dict[str, float | str]:
        """A row of a table; `x` names the column of beams or pictures."""
        recalls = {f"R@{cutoff}": round(value, 5) for cutoff, value in self.recall.items()}
        return {"system": self.system, x: self.x, "queries": self.queries, **recalls}


class Changes(NamedTuple):
    """What a guide changes for the queries of one system."""

    system: str
    weight: float
    queries: int
    won: int
    """Queries whose picture ranks first with the guide alone."""
    lost: int
    """Queries whose picture ranks first without it alone."""

    def row(self) -> dict[str, float | str]:
        """A row of a table."""
        return self._asdict()


class Speed(NamedTuple):
    """Queries per second at one size of the pool."""

    system: str
    pool: int
    queries_per_second: float
    made_up: int
    """Of the pool's pictures, those that do not exist."""

    def row(self) -> dict[str, float | str]:
        """A row of a table."""
        speed = round(self.queries_per_second, 1)
        return {"system": self.system, "pool": self.pool, "queries/s": speed, "made-up pictures": self.made_up}


def drawn(queries: Queries, pool: Rows, *, most: int, seed: int) -> Queries:
    """Queries whose picture is in the pool, at most so many, drawn at random: of two pools, the same ones first."""
    order = np.random.default_rng(seed).permutation(len(queries.texts))
    chosen = np.sort(order[np.isin(queries.pictures[order], pool)][:most])
    return Queries([queries.texts[place] for place in chosen], queries.pictures[chosen], queries.captions[chosen])


def growing_pools(data: RetrieverData, *, seed: int) -> list[Rows]:
    """Pools of growing size, the pictures of val first, the others in random order behind them; the last has all.

    One of the pools is val's own pictures.
    """
    generator = np.random.default_rng(seed)
    own = generator.permutation(data.rows("val"))
    others = generator.permutation(np.setdiff1d(data.rows("all"), own))
    order = np.concatenate([own, others])
    sizes = {size for size in SIZES if size < len(order)} | {len(own), len(order)}
    return [np.sort(order[:size]) for size in sorted(sizes) if size]


def recall_by_beams(system: System, data: RetrieverData, queries: Queries, beams: Sequence[int]) -> list[Figure]:
    """Recall over val's pictures with so many codes kept at each level."""
    return [_searched(system, data, queries, data.rows("val"), beams=beam, x=beam) for beam in beams]


def recall_by_pool(
    system: System, data: RetrieverData, pools: Sequence[Rows], queries: Sequence[Queries]
) -> list[Figure]:
    """Recall over each pool, of its own queries."""
    beams = system.searching.beams
    return [
        _searched(system, data, asked, pool, beams=beams, x=len(pool))
        for pool, asked in zip(pools, queries, strict=True)
    ]


def recall_by_weight(system: System, data: RetrieverData, queries: Queries) -> tuple[list[Figure], Changes | None]:
    """Recall over val's pictures with so much weight of the guide, and what the chosen weight changes; nothing of a
    system without a guide."""
    if system.guide is None:
        return [], None
    kept = system.guide.weight
    pool, beams = data.rows("val"), system.searching.beams
    ranks = {weight: _ranks(system, data, queries, pool, beams=beams, weight=weight) for weight in (*WEIGHTS, kept)}
    figures = [
        Figure(system.name, weight, len(queries.texts), summarize(ranks[weight]).recalls) for weight in sorted(ranks)
    ]
    first, before = ranks[kept] == 1, ranks[0.0] == 1
    changes = Changes(system.name, kept, len(first), int((first & ~before).sum()), int((before & ~first).sum()))
    return figures, changes


def two_tower_figure(features: Features, pool: Rows, queries: Queries) -> Figure:
    """Recall of brute-force search of the same queries over the same pool.

    Raises:
        BadInput: the dataset does not say which features its captions have.
    """
    if (queries.captions == UNKNOWN).any():
        raise BadInput("the dataset is of an earlier version: run scripts/07_prepare_retriever_dataset.sh --overwrite")
    return Figure(TWO_TOWER, len(pool), len(queries.texts), two_tower_recall(features, queries.captions, pool).recalls)


def _searched(system: System, data: RetrieverData, queries: Queries, pool: Rows, *, beams: int, x: int) -> Figure:
    ranks = _ranks(system, data, queries, pool, beams=beams, weight=0.0)
    return Figure(system.name, x, len(queries.texts), summarize(ranks).recalls)


def _ranks(system: System, data: RetrieverData, queries: Queries, pool: Rows, *, beams: int, weight: float) -> Ranks:
    """Rank of each query's picture, with so much weight of the guide."""
    lm = system.writer.lm
    guide = system.guide._replace(weight=weight) if weight and system.guide is not None else None
    features = data.text_features(queries.texts, lm.device) if needs_features(lm, guide) else None
    ranking = search_queries(
        system.writer,
        LiveQueries(system.writer.lm, queries.texts),
        data.codes,
        pool,
        beams=beams,
        keep=KEEP,
        batch_size=BATCH,
        scoring=system.searching.scoring,
        score_end=system.searching.score_end,
        guide=guide,
        features=features,
        quiet=True,
    )
    images, _ = ranks_of(ranking, queries.pictures, data.codes)
    return images


def enlarged(
    codes: NDArray[np.int64], images: Floats | None, size: int, *, codebook_size: int, seed: int
) -> tuple[NDArray[np.int64], Floats | None]:
    """Codes (size, levels) and features (size, width) of a pool filled up with pictures that do not exist.

    Their first codes are those of real pictures, the later ones are drawn: what a search costs depends on how many
    codes there are behind a prefix, not on what they stand for. Speed alone can be measured with them.
    """
    generator = np.random.default_rng([seed, size])
    missing = size - len(codes)
    made = codes[generator.integers(len(codes), size=missing)].copy()
    made[:, 1:] = generator.integers(codebook_size, size=(missing, codes.shape[1] - 1))
    if images is None:
        return np.concatenate([codes, made]), None
    noise = generator.standard_normal((missing, images.shape[1]), dtype=np.float32)
    return np.concatenate([codes, made]), np.concatenate([images, noise])


def generative_answer(system: System, codes: NDArray[np.int64]) -> Callable[[list[str]], object]:
    """Answering a batch of texts from pictures' codes (pool, levels): tokenised, encoded, searched, expanded."""
    index = build_index(codes)
    writer, searching = system.writer, system.searching
    levels = to_device(index, writer.lm.device)

    @torch.inference_mode()
    def answer(texts: list[str]) -> object:
        memory = writer.encode(writer.lm.tokenize(texts))
        options = {"scoring": searching.scoring, "score_end": searching.score_end}
        found = beam_search(writer, memory, levels, beams=searching.beams, **options)  # type: ignore[arg-type]
        return expand(found, index, keep=KEEP)

    return answer


def two_tower_answer(encoder: TextEncoder, images: Floats) -> Callable[[list[str]], object]:
    """Answering a batch of texts by the features (pool, width) of pictures: tokenised, encoded, compared with all."""
    index = flat_index(images, encoder.device)
    return lambda texts: index.search(encoded(encoder, texts), keep=KEEP)


def timed(answers: dict[str, Callable[[list[str]], object]], texts: Sequence[str], *, rounds: int) -> dict[str, float]:
    """Queries per second of each system: they take turns, so that a slow moment meets all of them; the median round.

    The texts go in batches of 64 of similar length. One batch of each warms it up.
    """
    ordered = sorted(texts, key=len)
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    for answer in answers.values():
        answer(batches[0])
    for _ in range(rounds):
        for name, answer in answers.items():
            began = time.perf_counter()
            for batch in batches:
                answer(batch)
            seconds[name].append(time.perf_counter() - began)
    return {name: len(ordered) / median(each) for name, each in seconds.items()}


def speed_by_pool(
    system: System,
    encoder: TextEncoder | None,
    data: RetrieverData,
    images: Floats | None,
    texts: Sequence[str],
    *,
    sizes: Sequence[int],
    rounds: int,
    seed: int,
) -> list[Speed]:
    """Speed of a retriever, and of two-tower search where there is an encoder, at each size of the pool.

    Args:
        images: (pictures, width) features that the encoder's are compared with.
    """
    order = np.random.default_rng(seed).permutation(len(data.codes))
    speeds = []
    for size in sizes:
        rows = np.sort(order[:size])
        codes, own = data.codes[rows], None if encoder is None or images is None else np.asarray(images[rows])
        if size > len(rows):
            codes, own = enlarged(codes, own, size, codebook_size=data.space.codebook_size, seed=seed)
        answers = {system.name: generative_answer(system, codes)}
        if encoder is not None and own is not None:
            answers[TWO_TOWER] = two_tower_answer(encoder, own)
        found = timed(answers, texts, rounds=rounds)
        speeds += [Speed(name, size, each, size - len(rows)) for name, each in found.items()]
    return speeds


def speed_sizes(pictures: int, *, largest: int) -> list[int]:
    """Pool sizes: powers of ten, and all pictures; beyond them, up to `largest`, pools that are filled up."""
    return sorted({10**power for power in range(2, 10) if 10**power <= max(pictures, largest)} | {pictures})
