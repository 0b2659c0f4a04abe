"""Beam search that can only write vokens of existing pictures: exact, and batched over queries.

The score of a picture is the sum of its vokens' log-probabilities, under the softmax over the whole vocabulary (as
published) or over the vokens of each level; and that of the end token where `score_end` is set (as published). A guide
(models/guide.py) adds what a two-tower model says of the same vokens. Children are taken from the index by position;
nothing loops over queries or beams. Equal scores go to the smaller codes, at every level.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.decoding import Scoring, Writer
from models.guide import Steering
from models.voken_lm import Memory

from .index import Leaves, SearchLevel


class Beams(NamedTuple):
    """The best leaves of the index for each query, best first; places that no picture fills score minus infinity."""

    leaves: Tensor
    """(queries, beams) int64; fewer columns where the index has fewer leaves"""
    scores: Tensor
    """(queries, beams) float32"""


class Candidates(NamedTuple):
    """What the beams of each query could write next; the first of them is the best."""

    nodes: Tensor
    """(queries, candidates) int64"""
    scores: Tensor
    """(queries, candidates) float32"""
    parents: Tensor
    """(queries, candidates) beams"""
    codes: Tensor
    """(queries, candidates)"""


@torch.inference_mode()
def beam_search(
    writer: Writer,
    memory: Memory,
    levels: Sequence[SearchLevel],
    *,
    beams: int,
    early_beams: int | None = None,
    scoring: Scoring = "full",
    score_end: bool = False,
    steering: Steering | None = None,
) -> Beams:
    """Search the index for the leaves that a language model gives the highest score.

    Args:
        memory: what `writer.encode` gives for the queries.
        levels: the index on the writer's device (`index.to_device`).
        beams: candidates kept at each level, and leaves returned.
        early_beams: candidates kept at the first half of the levels, where they are more than `beams`.
        scoring: the softmax: "full" or "voken", see `models.decoding.Head`.
        score_end: add the log-probability of the end token, one more decoder step; not with "voken".
        steering: the guide of these queries (`Guide.steer`), good for one search; None for the published search.

    Raises:
        ValueError: the end token is asked for in a softmax that does not have it.
        FloatingPointError: the model gives no numbers (it overflows in this arithmetic).
    """
    options: dict[str, Any] = {"beams": beams, "early_beams": early_beams, "scoring": scoring, "score_end": score_end}
    found, broken = search_steps(writer, memory, levels, steering=steering, **options)
    refuse_broken(broken)
    return found


def search_steps(
    writer: Writer,
    memory: Memory,
    levels: Sequence[SearchLevel],
    *,
    beams: int,
    early_beams: int | None = None,
    scoring: Scoring,
    score_end: bool,
    steering: Steering | None = None,
) -> tuple[Beams, Tensor]:
    """`beam_search` as the device sees it: nothing in it waits for a GPU, or copies to it.

    Returns:
        What was found, and a bool scalar: whether the model gave anything but numbers.

    Raises:
        ValueError: the end token is asked for in a softmax that does not have it.
    """
    if score_end and scoring == "voken":
        raise ValueError("the softmax over vokens has no end token: score_end needs scoring='full'")
    session = writer.begin(memory)
    scores = torch.zeros(len(memory.states), 1, device=memory.states.device)
    nodes = torch.zeros_like(scores, dtype=torch.long)
    places = Places(len(nodes), nodes.device)
    broken = torch.zeros((), dtype=torch.bool, device=scores.device)
    states = session.open()
    for number, level in enumerate(levels):
        log_probabilities = writer.head.log_probabilities(states, number, scoring)
        broken |= log_probabilities.isnan().any()
        if steering is not None:
            log_probabilities = log_probabilities + steering.gains(number)
        candidates = children_of(nodes, scores, log_probabilities, level)
        kept = max(beams, early_beams or 0) if number < len(levels) // 2 else beams
        if level.in_order:
            chosen = best(candidates, kept)
        else:
            size = log_probabilities.shape[2]
            chosen = best(candidates, kept, places.order(candidates, size))
            places.advance(chosen, size)
        nodes, scores, parents, codes = chosen
        if steering is not None:
            steering.advance(number, codes, parents)
        if number + 1 < len(levels) or score_end:
            states = session.advance(codes + writer.starts[number], parents)
    if score_end:
        ended = scores + writer.head.end_log_probability(states)
        order = nodes if levels[-1].in_order else places.places
        nodes, scores, *_ = best(Candidates(nodes, ended, nodes, nodes), beams, order)
    broken |= ~scores[:, 0].isfinite().all()  # every query has a picture, however unlikely
    return Beams(nodes, scores), broken


def refuse_broken(broken: Tensor) -> None:
    """Wait for a search to end, and refuse its result where the model gave anything but numbers.

    Raises:
        FloatingPointError: it did.
    """
    if broken:
        raise FloatingPointError("the model's scores are not numbers: search in another --precision")


def children_of(nodes: Tensor, scores: Tensor, log_probabilities: Tensor, level: SearchLevel) -> Candidates:
    """All children of the beams; a beam with fewer than the widest is filled up with scores of minus infinity.

    Args:
        nodes, scores: (queries, beams)
        log_probabilities: (queries, beams, codebook_size)
    """
    children = level.children(nodes)
    reached = scores.unsqueeze(2) + log_probabilities.gather(2, children.codes)
    reached = reached.masked_fill(~children.exist, -torch.inf)
    parents = torch.arange(nodes.shape[1], device=nodes.device)[:, None].expand_as(children.nodes)
    return Candidates(*(part.flatten(1) for part in (children.nodes, reached, parents, children.codes)))


def best(candidates: Candidates, beams: int, order: Tensor | None = None) -> Candidates:
    """The `beams` best candidates of each query in order; among equals the one with the smaller codes.

    Args:
        order: (queries, candidates) below 2^32, in the order of their codes; by default the nodes are.
    """
    keys = (_ordered_bits(candidates.scores) << 32) - (candidates.nodes if order is None else order)
    chosen = keys.topk(min(beams, keys.shape[1]), dim=1).indices
    return Candidates(*(part.gather(1, chosen) for part in candidates))


class Places:
    """The place of every beam in the order of its codes, where nodes do not tell."""

    def __init__(self, queries: int, device: torch.device) -> None:
        self.places = torch.zeros(queries, 1, dtype=torch.long, device=device)

    def order(self, candidates: Candidates, codebook_size: int) -> Tensor:
        """Numbers (queries, candidates) in the order of all codes that are written."""
        return self.places.gather(1, candidates.parents) * codebook_size + candidates.codes

    def advance(self, chosen: Candidates, codebook_size: int) -> None:
        """Go on from the candidates that are the beams now."""
        self.places = self.order(chosen, codebook_size).argsort(dim=1).argsort(dim=1)


def _ordered_bits(scores: Tensor) -> Tensor:
    """float32 to int64 of the same order."""
    bits = scores.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


class RankedPictures(NamedTuple):
    """Pictures of one query, best first, each once, with the score of its codes."""

    rows: list[int]
    scores: list[float]


def expand(found: Beams, index: Leaves, *, keep: int) -> list[RankedPictures]:
    """Leaves to pictures: the best leaf's pictures first; inside a collision, in the order of the pool.

    Args:
        keep: codes a query at most; all pictures of each are given.
    """
    leaves, scores = found.leaves[:, :keep].cpu().numpy(), found.scores[:, :keep].cpu().numpy()
    filled = np.isfinite(scores)
    rows, owners = index.expand(leaves[filled])
    queries, each = np.nonzero(filled)[0][owners], scores[filled][owners]
    ends = np.searchsorted(queries, np.arange(1, len(leaves)))
    return [
        RankedPictures(own.tolist(), values.tolist())
        for own, values in zip(np.split(rows, ends), np.split(each, ends), strict=True)
    ]
