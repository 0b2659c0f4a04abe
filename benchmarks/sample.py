"""The emoji sample's trained retriever: what scoring and precision do to its recall, and its speed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.arithmetic import Arithmetic
from models.decoding import Scoring, Writer, make_writer
from models.voken_lm import VokenLM
from retriever.data import RetrieverData, read_data, read_retriever
from retriever.index import build_index, to_device
from retriever.queries import LiveQueries
from retriever.retrieve import ranks_of, search_queries
from tests.oracle import dictionary_trie, generate
from tools.features import read_features
from tools.recall import CUTOFFS, Report, report
from tools.two_tower import two_tower_recall

from .calls import encode_only, engine
from .rows import Setting
from .timing import interleave

BEAMS, BATCH, SPEED_BATCH = 10, 64, 32


class SampleFigures(NamedTuple):
    """Rows of two tables."""

    recall: list[dict[str, Any]]
    speed: list[dict[str, Any]]


def sample_figures(folder: Path, device: torch.device) -> SampleFigures:
    """Recall of all test captions over both pools, in every scoring and precision; speed of a batch of 32."""
    data = read_data(folder / "07_dataset")
    read_retriever(folder / "09_train" / "retriever", data)
    lm = VokenLM.from_pretrained(folder / "09_train" / "retriever" / "model").to(device)
    variants: list[tuple[Arithmetic, Scoring]] = [("fp32", "full"), ("fp32", "voken"), ("bf16", "full")]
    variants += [("bf16", "voken"), *([("int8", "voken")] if device.type == "cpu" else [])]  # type: ignore[list-item]
    recall = []
    for pool in ("test", "all"):
        recall.append(two_tower_row(data, pool))
        recall += [recall_row(lm, data, pool, *variant) for variant in variants]
    return SampleFigures(recall, speed_rows(lm, data))


def two_tower_row(data: RetrieverData, pool: str) -> dict[str, Any]:
    """Brute-force search of the test captions with the encoder whose features the vokens are made of."""
    features = read_features(Path(data.manifest.facts["features"]))
    rows = data.rows(pool)
    figures = two_tower_recall(features, features.text_rows("test"), rows)
    return _row(f"{pool} ({len(rows):,})", "two-tower", "-", figures, None)


def recall_row(lm: VokenLM, data: RetrieverData, pool: str, kind: Arithmetic, scoring: Scoring) -> dict[str, Any]:
    """Image-level recall of one variant, and the mean probability of a level's vokens on the right pictures' codes."""
    writer = make_writer(lm, kind)
    queries = data.queries("test")
    live = LiveQueries(lm, queries.texts)
    ranking = search_queries(
        writer,
        live,
        data.codes,
        data.rows(pool),
        beams=BEAMS,
        keep=BEAMS,
        batch_size=BATCH,
        scoring=scoring,
        quiet=True,
    )
    figures = report(ranks_of(ranking, queries.pictures, data.codes)[0])
    probability = round(voken_probability(writer, live, data.codes[queries.pictures]), 6)
    return _row(f"{pool} ({len(data.rows(pool)):,})", scoring, kind, figures, probability)


def _row(pool: str, scoring: str, precision: str, figures: Report, probability: float | None) -> dict[str, Any]:
    return {
        "pool": pool,
        "scoring": scoring,
        "precision": precision,
        **{f"R@{cutoff}": f"{figures.recalls[cutoff]:.2%}" for cutoff in CUTOFFS},
        "MRR": round(figures.mrr, 4),
        "voken probability": probability,
    }


@torch.inference_mode()
def voken_probability(writer: Writer, queries: LiveQueries, codes: NDArray[np.int64]) -> float:
    """Mean, over queries and levels, of the full softmax's probability of the level's vokens, on the right path.

    Args:
        codes: (queries, levels) of the picture each asks for.
    """
    offsets = writer.lm.level_offsets.to(writer.lm.device)
    means = []
    order = np.argsort(queries.lengths, kind="stable")
    for batch in np.array_split(order, max(1, len(order) // BATCH)):
        written = torch.from_numpy(codes[batch]).to(writer.lm.device) + offsets
        session = writer.begin(queries.memory(batch, writer.encode))
        states = session.open()
        for level in range(written.shape[1]):
            means.append(float(writer.head.voken_probability(states, level).mean()))
            if level + 1 < written.shape[1]:
                states = session.advance(written[:, level : level + 1], torch.zeros_like(written[:, :1]))
    return float(np.mean(means))


def speed_rows(lm: VokenLM, data: RetrieverData) -> list[dict[str, Any]]:
    """Milliseconds a query over all pictures: the encoder alone, this engine, `generate` with a cache."""
    tokens = sorted(lm.tokenize(data.queries("test").texts[::7]), key=len)
    token_ids = tokens[len(tokens) // 2 : len(tokens) // 2 + SPEED_BATCH]
    levels = to_device(build_index(data.codes), lm.device)
    trie = dictionary_trie(lm, data.codes, score_end=False)
    setting = Setting("sample", len(data.codes), BEAMS, token_ids)
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("generate, cache", "fp32"): partial(generate, lm, trie, token_ids, beams=BEAMS, score_end=False)
    }
    for kind in ("fp32", "bf16"):
        writer = make_writer(lm, kind)
        calls["text encoder alone", kind] = partial(encode_only, writer, setting)
        for scoring in ("full", "voken"):
            calls[f"engine, {scoring}", kind] = partial(engine, writer, levels, setting, scoring=scoring)
    timings = interleave(calls, repeats=7, memory=False)
    return [
        {
            "system": system,
            "precision": kind,
            "ms/query": round(timing.median / len(token_ids) * 1e3, 2),
            "over its encoder": round(timing.median / timings["text encoder alone", kind].median, 2),
        }
        for (system, kind), timing in timings.items()
    ]
