"""Beam search that can only write vokens of existing pictures: exact, and batched over queries.

The score of a picture is the sum of the log-probabilities of its vokens under the full-vocabulary softmax, plus that
of the end token where `score_end` is set (as published). Children are taken from the trie by index; nothing loops over
queries or beams. Ties go to the smaller codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.voken_lm import Memory, VokenLM

from .trie import Trie


class Beams(NamedTuple):
    """The best leaves of the trie for each query, best first; places that no picture fills score minus infinity."""

    leaves: Tensor
    """(queries, beams) int64"""
    scores: Tensor
    """(queries, beams) float32"""


class DeviceTrie(NamedTuple):
    """The trie's levels on the model's device."""

    offsets: list[Tensor]
    codes: list[Tensor]
    widest: list[int]


def to_device(trie: Trie, device: torch.device) -> DeviceTrie:
    """Copy the flat arrays once."""
    return DeviceTrie(
        [torch.from_numpy(level.offsets).to(device) for level in trie.levels],
        [torch.from_numpy(level.codes).to(device) for level in trie.levels],
        trie.widest,
    )


@torch.inference_mode()
def beam_search(lm: VokenLM, memory: Memory, trie: DeviceTrie, *, beams: int, score_end: bool = False) -> Beams:
    """Search the trie for the leaves a language model gives the highest probability.

    Args:
        memory: encoder states of the queries.
        beams: candidates kept at each level, and leaves returned.
        score_end: add the log-probability of the end token, one more decoder step.
    """
    queries = len(memory.states)
    device = memory.states.device
    offsets = lm.level_offsets.to(device)
    scores = torch.zeros(queries, 1, device=device)
    nodes = torch.zeros(queries, 1, dtype=torch.long, device=device)
    logits, cache = lm.first_logits(memory)
    for level in range(len(trie.codes)):
        width = nodes.shape[1]
        log_probabilities = logits.float().log_softmax(dim=-1).view(queries, width, -1)
        first = trie.offsets[level][nodes].unsqueeze(2)
        children = first + torch.arange(trie.widest[level], device=device)
        exists = children < trie.offsets[level][nodes + 1].unsqueeze(2)
        children = children.clamp_max(len(trie.codes[level]) - 1)
        tokens = trie.codes[level][children] + offsets[level]
        candidates = scores.unsqueeze(2) + log_probabilities.gather(2, tokens)
        candidates = candidates.masked_fill(~exists, -torch.inf).flatten(1)
        keep = min(beams, candidates.shape[1])
        scores, chosen = candidates.sort(dim=1, descending=True, stable=True)
        scores, chosen = scores[:, :keep], chosen[:, :keep]
        nodes = children.flatten(1).gather(1, chosen)
        written = tokens.flatten(1).gather(1, chosen)
        parents = chosen // trie.widest[level]
        if level + 1 < len(trie.codes) or score_end:
            rows = (parents + torch.arange(queries, device=device).unsqueeze(1) * width).flatten()
            of_query = torch.arange(queries, device=device).repeat_interleave(keep)
            logits = lm.next_logits(
                Memory(memory.states[of_query], memory.mask[of_query]), written.flatten(), cache, rows
            )
    if score_end:
        scores = scores + logits.float().log_softmax(dim=-1)[:, lm.end].view_as(scores)
    return _sorted(nodes, scores)


def _sorted(leaves: Tensor, scores: Tensor) -> Beams:
    """Best first; equal scores by leaf, i.e. by codes."""
    leaves, order = leaves.sort(dim=1)
    scores = scores.gather(1, order)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Beams(leaves.gather(1, order), scores)


class RankedPictures(NamedTuple):
    """Pictures of one query, best first, each once, with the score of its codes."""

    rows: list[int]
    scores: list[float]


def expand(beams: Beams, trie: Trie, *, keep: int) -> list[RankedPictures]:
    """Leaves to pictures: the best leaf's pictures first; inside a collision, in the order of the pool.

    Args:
        keep: codes a query at most; all pictures of each are given.
    """
    results = []
    for leaves, scores in zip(beams.leaves.cpu().numpy(), beams.scores.cpu().numpy(), strict=True):
        found = leaves[np.isfinite(scores)][:keep]
        groups: Sequence[NDArray[np.int64]] = [trie.pictures_of(leaf) for leaf in found]
        rows = [int(row) for group in groups for row in group]
        each = [float(score) for group, score in zip(groups, scores, strict=False) for _ in group]
        results.append(RankedPictures(rows, each))
    return results
