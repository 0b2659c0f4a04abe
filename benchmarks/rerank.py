"""Queries per second of reranking 50 pictures a query: whole prompts padded as published, one at a time or a list at a
time; whole prompts without padding; and every picture's part of the prompt computed once (reranker/rerank.py).

In:  nothing; random weights, random pictures and queries.
Out: `benchmarks/results/rerank.json`, every row and the ratios.
Command: python -m benchmarks.rerank [--quick]

Two kinds of lists: all drawn from one pool, so that a picture stands in several, and each query with pictures of its
own, where nothing can be shared. What the slow systems compute for a query does not depend on the others, so they
answer only some of the queries; scores and orders are compared on those. Every system gets the queries as text and
tokenizes each once.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from models.compute import DTYPES, autocast, pick_device
from models.scorer import CLOSE_IMAGE, OPEN_IMAGE, START_SPREAD, ImageTokens, Scorer, scoring_head
from reranker.rerank import CPU_PAIRS, GPU_PAIRS, Scores, score_lists
from tools.command_line.commands import run_command
from tools.files import write_json
from tools.logs import table
from tools.ranked import RankedLists

from .timing import Timing, interleave, machine

PADDED_LENGTH = 64  # tokens of a prompt, published
CANDIDATES = 50  # pictures of a list
QUERY_TOKENS = (5, 20)
IMAGES = ImageTokens(length=32, size=2048)
PROMPT_WORDS = ("<pad>", "</s>", "<unk>", "<s>", "USER", "Image", "Query", "ASSISTANT", ":")
TEXT_VOCABULARY = 30522  # BERT's, which the sample's reranker borrows: 32,572 with marks and image tokens

System = Literal[
    "one by one, padded",
    "list at once, padded",
    "list at once, trimmed",
    "pictures shared, 2048 pairs",
    "pictures shared, 100 pairs",
]
Kind = Literal["one pool", "own pictures"]
Method = Callable[..., Scores]


class Shape(NamedTuple):
    """A LLaMA, and how often it is asked."""

    name: str
    layers: int
    width: int
    heads: int
    feed_forward: int
    pool: int
    """Pictures in the one pool"""
    queries: int
    """Lists over it, which sharing answers together"""
    compared: int
    """Queries among them that every system answers"""
    rounds: int


SHAPES = (
    Shape("sample", 2, 128, 4, 320, pool=200, queries=100, compared=10, rounds=3),
    Shape("medium", 6, 512, 8, 1376, pool=80, queries=16, compared=2, rounds=2),
)
QUICK = (SHAPES[0]._replace(queries=20, compared=2, rounds=1),)


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    quick: bool = False
    """Only the smaller model, once and with few queries: some seconds; the whole takes about three minutes."""
    output: Path = Path("benchmarks/results")
    """Folder of rerank.json."""


class Row(NamedTuple):
    """One measured system; seconds are of one call that answers all its queries."""

    shape: str
    lists: Kind
    system: System
    precision: str
    pictures: int
    queries: int
    seconds: float
    least: float
    most: float
    rounds: int
    queries_per_second: float
    same_order: str
    """Lists in the order that one by one in fp32 gives"""
    score_difference: float
    """From those scores, at most"""
    score_spread: float
    """Standard deviation of those within a list"""


class Case(NamedTuple):
    """Lists of one kind."""

    kind: Kind
    tokens: NDArray[np.int64]
    """(pictures, IMAGES.length)"""
    lists: RankedLists
    compared: NDArray[np.int64]
    """Places of the queries that every system answers"""


def make_scorer(shape: Shape) -> Scorer:
    """A scorer with random weights, spread as those of a new one (models/scorer.py)."""
    torch.manual_seed(0)
    words = [*PROMPT_WORDS, *(word(number) for number in range(TEXT_VOCABULARY - len(PROMPT_WORDS)))]
    raw = Tokenizer(models.WordLevel({each: place for place, each in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )
    tokenizer.add_tokens([OPEN_IMAGE, CLOSE_IMAGE])
    config = LlamaConfig(
        vocab_size=len(tokenizer) + IMAGES.size,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        initializer_range=0.8 * shape.width**-0.5,
    )
    model = LlamaModel(config)
    model.embed_tokens.weight.data.normal_(std=START_SPREAD)
    parts = (model, scoring_head(shape.width), tokenizer)
    return Scorer(*parts, images=IMAGES, first_image=len(tokenizer), max_query=QUERY_TOKENS[1]).eval()


def word(number: int) -> str:
    """A word that is one token."""
    return f"word{number}"


def make_case(kind: Kind, shape: Shape) -> Case:
    """Random pictures and lists; queries of all lengths, shortest first."""
    generator = np.random.default_rng(0)
    queries = shape.queries if kind == "one pool" else shape.compared
    lengths = np.linspace(*QUERY_TOKENS, queries).round().astype(int)
    said = [generator.integers(TEXT_VOCABULARY - len(PROMPT_WORDS), size=length).tolist() for length in lengths]
    if kind == "one pool":
        rows = np.stack([generator.permutation(shape.pool)[:CANDIDATES] for _ in said])
    else:
        rows = np.arange(queries * CANDIDATES).reshape(queries, CANDIDATES)
    tokens = generator.integers(IMAGES.size, size=(rows.max() + 1, IMAGES.length))
    texts = [" ".join(map(word, numbers)) for numbers in said]
    lists = RankedLists(texts, np.arange(queries), rows[:, 0], rows, np.zeros(rows.shape, dtype=np.float32))
    return Case(kind, tokens, lists, np.linspace(0, queries - 1, shape.compared).round().astype(np.int64))


@torch.inference_mode()
def score_padded(
    scorer: Scorer, tokens: NDArray[np.int64], lists: RankedLists, *, at_once: int, dtype: torch.dtype = torch.float32
) -> Scores:
    """Whole prompts padded to a fixed length, without a cache; read at their last token, not at the padding's.

    Args:
        at_once: prompts of one query in a forward pass.
    """
    scores = np.empty(lists.rows.shape, dtype=np.float32)
    with autocast(scorer.device, dtype):
        for own, rows, query in zip(scores, lists.rows, scorer.query_ids(lists.texts), strict=True):
            for start in range(0, len(rows), at_once):
                pictures = scorer.picture_ids(tokens[rows[start : start + at_once]])
                ids = torch.full((len(pictures), PADDED_LENGTH), scorer.padding)
                end = pictures.shape[1] + len(query)
                ids[:, :end] = torch.cat([pictures, torch.tensor(query).expand(len(pictures), -1)], dim=1)
                mask = (torch.arange(PADDED_LENGTH) < end).long().expand_as(ids)
                parts = {"input_ids": ids.to(scorer.device), "attention_mask": mask.to(scorer.device)}
                states = scorer.model(**parts, use_cache=False).last_hidden_state
                own[start : start + at_once] = scorer.head(states[:, end - 1]).squeeze(1).float().cpu().numpy()
    return scores


@torch.inference_mode()
def score_trimmed(
    scorer: Scorer, tokens: NDArray[np.int64], lists: RankedLists, *, dtype: torch.dtype = torch.float32
) -> Scores:
    """Whole prompts, those of a query together and none longer than they are."""
    scores = np.empty(lists.rows.shape, dtype=np.float32)
    with autocast(scorer.device, dtype):
        for own, rows, query in zip(scores, lists.rows, scorer.query_ids(lists.texts), strict=True):
            places = torch.arange(len(rows))
            pairs = scorer.pairs(tokens[rows], [query], places, torch.zeros_like(places))
            own[:] = scorer(pairs, share_pictures=False).cpu().numpy()
    return scores


METHODS: dict[System, Method] = {
    "one by one, padded": partial(score_padded, at_once=1),
    "list at once, padded": partial(score_padded, at_once=CANDIDATES),
    "list at once, trimmed": score_trimmed,
    "pictures shared, 2048 pairs": partial(score_lists, pairs=GPU_PAIRS, quiet=True),
    "pictures shared, 100 pairs": partial(score_lists, pairs=CPU_PAIRS, quiet=True),
}
BASELINE: System = "one by one, padded"
SHARED: tuple[System, ...] = ("pictures shared, 2048 pairs", "pictures shared, 100 pairs")


def measure(shape: Shape, scorer: Scorer, case: Case) -> list[Row]:
    """Time all systems against each other on one case, and compare what they found."""
    found: dict[tuple[System, str], Scores] = {}
    calls: dict[tuple[System, str], Callable[[], None]] = {}
    asked: dict[tuple[System, str], RankedLists] = {}
    for name in systems_of(case.kind):
        system, precision = name
        asked[name] = case.lists if system in SHARED else case.lists.some(case.compared)
        answer = partial(METHODS[system], scorer, case.tokens, dtype=DTYPES[precision])
        answer(case.lists.some(case.compared[:1]).first(2))  # no other call pays for what is done once

        def call(name: tuple[System, str] = name, answer: Method = answer) -> None:
            found[name] = answer(asked[name])

        calls[name] = call
    timings = interleave(calls, repeats=shape.rounds, warm_up=False, memory=False)
    expected = found[BASELINE, "fp32"]
    rows = []
    for name, timing in timings.items():
        scores = found[name] if len(found[name]) == len(expected) else found[name][case.compared]
        rows.append(row_of(shape, case, name, timing, len(found[name]), scores, expected))
    return rows


def systems_of(kind: Kind) -> list[tuple[System, str]]:
    """What is measured, by (system, precision): bf16 of the first and the last only, and over one pool."""
    half: list[tuple[System, str]] = [(BASELINE, "bf16"), (SHARED[-1], "bf16")] if kind == "one pool" else []
    return [(system, "fp32") for system in METHODS] + half


def row_of(
    shape: Shape,
    case: Case,
    name: tuple[System, str],
    timing: Timing,
    queries: int,
    scores: Scores,
    expected: Scores,
) -> Row:
    """A row from the time of `queries` and the scores (compared, longest) of those that all systems answer."""
    same = (order(scores) == order(expected)).all(axis=1)
    return Row(
        shape.name,
        case.kind,
        *name,
        len(case.tokens),
        queries,
        timing.median,
        timing.least,
        timing.most,
        timing.repeats,
        round(queries / timing.median, 3),
        f"{same.sum()} of {len(same)}",
        float(np.abs(scores - expected).max()),
        round(float(expected.std(axis=1).mean()), 4),
    )


def order(scores: Scores) -> NDArray[np.int64]:
    """Places (queries, longest) of each list, best first."""
    return np.argsort(-scores, axis=1, kind="stable")


def ratios_of(rows: list[Row]) -> dict[str, float]:
    """How many times as many queries per second sharing answers as each other system of the same precision."""
    return {
        f"{row.shape}, {row.lists}, {row.precision}: {row.system} / {other.system}": round(
            row.queries_per_second / other.queries_per_second, 3
        )
        for row in rows
        for other in rows
        if row.system in SHARED and other.system not in SHARED and _group(row) == _group(other)
    }


def _group(row: Row) -> tuple[str, Kind, str]:
    """Rows that are compared agree in this."""
    return row.shape, row.lists, row.precision


def cells(row: Row, rows: list[Row]) -> dict[str, Any]:
    """A row as a table for people has it; `rows` are those it was measured with."""
    baseline = next(each for each in rows if each.system == BASELINE and each.precision == row.precision)
    return {
        "system": row.system,
        "precision": row.precision,
        "pictures": row.pictures,
        "queries": row.queries,
        "ms/query": round(row.seconds / row.queries * 1e3, 1),
        "queries/s": row.queries_per_second,
        "spread": f"{row.least / row.seconds:.2f}-{row.most / row.seconds:.2f}",
        "times one by one": f"{row.queries_per_second / baseline.queries_per_second:.2f}",
        "same order": row.same_order,
        "score difference": f"{row.score_difference:.1e}",
        "of scores that vary by": row.score_spread,
    }


def main(config: Config) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows: list[Row] = []
    for shape in QUICK if config.quick else SHAPES:
        scorer = make_scorer(shape).to(pick_device())
        kinds: tuple[Kind, ...] = ("one pool", "own pictures")
        for kind in kinds:
            found = measure(shape, scorer, make_case(kind, shape))
            title = f"{shape.name}: {shape.layers} layers, {shape.width} wide; {kind}"
            print(f"\n{title}\n" + table([cells(row, found) for row in found]), flush=True)
            rows += found
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(
        config.output / "rerank.json",
        {
            "command": " ".join(["python -m benchmarks.rerank", *sys.argv[1:]]),
            "machine": machine(),
            "torch": torch.__version__,
            "candidates": CANDIDATES,
            "shapes": [shape._asdict() for shape in (QUICK if config.quick else SHAPES)],
            "ratios": ratios_of(rows),
            "rows": [row._asdict() for row in rows],
        },
    )
    print("\n" + table([{"ratio": name, "value": value} for name, value in ratios_of(rows).items()]))


if __name__ == "__main__":
    run_command(main, Config)
