"""What a report shows of single queries: the best, typical and worst of a stored search, and the vokens behind them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.decoding import Scoring, Writer
from tools.command_line.command_names import scripts_for
from tools.errors import BadInput
from tools.files import read_json_lines
from tools.ranked import read_lists
from tools.recall import NOT_FOUND, Ranks, image_rank
from tools.runs import Manifest

from ..data import RetrieverData

Kind = Literal["best", "typical", "worst"]
Codes = NDArray[np.int64]

ALTERNATIVES = 3  # codes shown beside the one of a picture


class Lists(NamedTuple):
    """A finished search: every query with the pictures it found."""

    texts: list[str]
    targets: NDArray[np.int64]
    """(queries,) row of the picture each asks for"""
    rows: list[list[int]]
    """Pictures found, best first."""
    scores: list[list[float]]
    ranks: Ranks
    """(queries,) of the right picture"""


class Voken(NamedTuple):
    """One code that may be written at a level."""

    code: int
    probability: float
    """Among the codes that pictures of the pool have here; over all of them it sums to 1."""


class Step(NamedTuple):
    """One level of a picture's codes, written behind the ones before."""

    written: Voken
    log_probability: float
    """Under the softmax of the search: over the levels it sums to the picture's score."""
    place: int
    """Among the codes that pictures of the pool have here, 1 for the most probable."""
    choices: int
    """How many these are."""
    others: list[Voken]
    """The most probable of the others."""


class Example(NamedTuple):
    """One query of the gallery."""

    kind: Kind
    number: int
    """Of the query among all."""
    query: str
    picture: int
    rank: int
    """`NOT_FOUND` where the picture is not in the list."""
    rows: list[int]
    scores: list[float]


def read_found(predictions: Manifest, data: RetrieverData, pool: str) -> Lists:
    """The lists of a `retriever.retrieve` run over one pool.

    Raises:
        BadInput: it searched other pictures than the dataset has.
    """
    row_of = {image: row for row, image in enumerate(data.images)}
    lines = [line for _, line in read_json_lines(predictions.folder / f"{pool}.jsonl")]
    try:
        targets = [row_of[line["image"]] for line in lines]
        rows = [[row_of[image] for image in line["ranked"]] for line in lines]
    except KeyError as error:
        raise BadInput(
            f"{predictions.folder} found {error.args[0]}, {data.folder} does not have it: run "
            f"{scripts_for(predictions.folder, 'retriever.retrieve')} --overwrite"
        ) from None
    ranks = [image_rank(found, target) for found, target in zip(rows, targets, strict=True)]
    return Lists(
        [line["query"] for line in lines],
        np.array(targets, dtype=np.int64),
        rows,
        [line["scores"] for line in lines],
        np.array(ranks, dtype=np.int64),
    )


def reordered_ranks(path: Path, found: Lists) -> Ranks | None:
    """Rank of each query's picture in lists that `reranker.test` reordered; None where they answer other queries.

    Args:
        path: its `<split>-<pool>.<name>.jsonl`.
    """
    lists = read_lists(path)
    if lists.texts != found.texts or not np.array_equal(lists.pictures, found.targets):
        return None
    hits = lists.rows == lists.pictures[:, None]
    ranks: Ranks = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, NOT_FOUND)
    return ranks


def typical_rank(ranks: Ranks) -> int:
    """The rank in the middle of all ranks; `NOT_FOUND` where most pictures were not found."""
    return int(np.sort(ranks)[(len(ranks) - 1) // 2])


def choose(found: Lists, count: int) -> list[Example]:
    """`count` queries of each kind, without a picture twice.

    The best have their picture first, with the widest lead over the second; the typical have it at the median rank, and
    are drawn at even steps; the worst have it nowhere in their list, or last, while the first picture's score is high.
    """
    leads = np.array([scores[0] - scores[1] if len(scores) > 1 else 0.0 for scores in found.scores])
    certainty = np.array([scores[0] if scores else -np.inf for scores in found.scores])
    first = np.flatnonzero(found.ranks == 1)
    middle = np.flatnonzero(found.ranks == typical_rank(found.ranks))
    orders: dict[Kind, NDArray[np.int64]] = {
        "best": first[np.argsort(-leads[first], kind="stable")],
        "typical": _even_steps(middle, count),
        "worst": np.lexsort((-certainty, -np.minimum(found.ranks, len(found.texts) + 1))),
    }
    examples: list[Example] = []
    seen: set[int] = set()
    for kind, order in orders.items():
        taken = 0
        for number in order.tolist():
            picture = int(found.targets[number])
            if taken == count or picture in seen or (kind == "worst" and found.ranks[number] == 1):
                continue
            seen.add(picture)
            taken += 1
            rank = int(found.ranks[number])
            examples.append(
                Example(kind, number, found.texts[number], picture, rank, found.rows[number], found.scores[number])
            )
    return examples


def _even_steps(places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The places at even steps first, the others behind them: where one is taken already, another takes its turn."""
    chosen = np.linspace(0, len(places) - 1, num=min(count, len(places))).astype(np.int64)
    return np.concatenate([places[chosen], np.delete(places, chosen)])


@torch.inference_mode()
def step_log_probabilities(writer: Writer, texts: Sequence[str], codes: Codes, scoring: Scoring) -> torch.Tensor:
    """Log-probabilities of every code at every level when the given codes are written.

    Args:
        codes: (queries, sequences, levels), for each text the sequences that are written side by side.

    Returns:
        (queries, sequences, levels, codebook_size) float32 on the CPU.
    """
    memory = writer.encode(writer.lm.tokenize(texts))
    session = writer.begin(memory)
    written = torch.from_numpy(codes).to(memory.states.device)
    offsets = writer.lm.level_offsets.to(written.device)
    own = torch.arange(codes.shape[1], device=written.device).expand(codes.shape[:2])
    states = session.open().expand(-1, codes.shape[1], -1)
    levels = []
    for level in range(codes.shape[2]):
        levels.append(writer.head.log_probabilities(states, level, scoring).cpu())
        if level + 1 < codes.shape[2]:
            states = session.advance(written[:, :, level] + offsets[level], own if level else torch.zeros_like(own))
    return torch.stack(levels, dim=2)


def steps(log_probabilities: torch.Tensor, codes: Codes, pool: Codes) -> list[Step]:
    """What a picture's codes cost, level by level.

    Args:
        log_probabilities: (levels, codebook_size) with the codes written.
        codes: (levels,)
        pool: (pictures, levels) codes that may be written.
    """
    found = []
    behind = pool
    for level, code in enumerate(codes.tolist()):
        allowed = np.unique(behind[:, level])
        own = log_probabilities[level].double()
        values = (own - own[allowed].logsumexp(dim=0)).exp().numpy()
        order = allowed[np.argsort(-values[allowed], kind="stable")]
        others = [Voken(int(each), float(values[each])) for each in order if each != code][:ALTERNATIVES]
        place = int(np.flatnonzero(order == code)[0]) + 1
        found.append(Step(Voken(code, float(values[code])), float(own[code]), place, len(allowed), others))
        behind = behind[behind[:, level] == code]
    return found


class Explained(NamedTuple):
    """An example with its steps."""

    example: Example
    right: list[Step]
    """Of the picture that was asked for."""
    first: list[Step] | None
    """Of the picture that was ranked first, where that is another."""


def explain(
    writer: Writer, examples: Sequence[Example], data: RetrieverData, pool: NDArray[np.int64], scoring: Scoring
) -> list[Explained]:
    """The vokens of each example's right picture, and of the first one, with their probabilities.

    Args:
        pool: rows of the pictures that could be found.
    """
    if not examples:
        return []
    pairs = [(each.picture, each.rows[0] if each.rows else each.picture) for each in examples]
    codes = data.codes[np.array(pairs)]
    logs = step_log_probabilities(writer, [each.query for each in examples], codes, scoring)
    allowed = data.codes[pool]
    return [
        Explained(
            example,
            steps(logs[number, 0], codes[number, 0], allowed),
            None if first == right else steps(logs[number, 1], codes[number, 1], allowed),
        )
        for number, (example, (right, first)) in enumerate(zip(examples, pairs, strict=True))
    ]
