"""Scoring ranked lists with the reranker: in batches, every picture's part of the prompt computed once."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.compute import autocast
from models.opened_pictures import OpenedPictures
from models.scorer import Scorer
from tools.blocks import Blocks
from tools.errors import BadInput
from tools.files import read_array, write_array
from tools.logs import progress
from tools.ranked import RankedLists

from .memory import costs_of, plan

BLOCK_BATCHES = 16  # batches a block: what a killed run loses at most, in each process
CPU_PAIRS, GPU_PAIRS = 100, 2048  # a CPU is fastest while a batch stays in its caches: benchmarks/rerank.py

Scores = NDArray[np.float32]


@torch.inference_mode()
def score_lists(
    scorer: Scorer,
    tokens: NDArray[np.integer],
    lists: RankedLists,
    *,
    dtype: torch.dtype = torch.float32,
    pairs: int | None = None,
    memory: float = 4.0,
    blocks_folder: Path | None = None,
    quiet: bool = False,
) -> Scores:
    """Score every picture of every list: (queries, longest), -inf behind the end of a list.

    Args:
        tokens: (pictures, length) image tokens of all pictures.
        dtype: arithmetic of the forward passes.
        pairs: of a query and a picture that are scored in one batch, at most; one query's all go together. By default
            100 on a CPU and 2048 elsewhere.
        memory: GiB for all that scoring needs beside the weights: pictures' keys and values, of which those that do
            not fit are computed again, and the forward passes, which are divided until they fit.
        blocks_folder: share the batches with the other processes, in blocks below this folder that a killed run keeps:
            a folder of its own for each call. Without it each process scores everything.

    Raises:
        BadInput: a score is no number, or the memory is not enough for one pair.
    """
    scorer.eval()
    if pairs is None:
        pairs = CPU_PAIRS if scorer.device.type == "cpu" else GPU_PAIRS
    with autocast(scorer.device, dtype):
        scoring = _Scoring(scorer, tokens, lists, pairs=pairs, memory=memory)
        batches = scoring.batches()
        if blocks_folder is None:
            found: Iterator[Scores] = map(scoring.score, batches if quiet else progress(batches, "scoring"))
        else:
            found = _score_blocks(scoring, batches, blocks_folder, quiet=quiet)
        scores = np.full(lists.rows.shape, -np.inf, dtype=np.float32)
        for batch, own in zip(batches, found, strict=True):
            scores[batch] = own
    if not np.isfinite(scores[lists.present]).all():  # no order follows from them, but ranks would all be the first
        raise BadInput("the reranker's scores are not numbers: train it at a lower --lr, or use another --precision")
    return scores


class _Scoring:
    """One call of `score_lists`."""

    def __init__(
        self, scorer: Scorer, tokens: NDArray[np.integer], lists: RankedLists, *, pairs: int, memory: float
    ) -> None:
        self.scorer, self.tokens, self.lists = scorer, tokens, lists
        self.queries = scorer.query_ids(lists.texts)
        longest = max(1, lists.rows.shape[1])
        distinct = len(np.unique(lists.rows[lists.present]))
        self.opened = OpenedPictures(scorer, tokens)
        self.batch_size = max(1, pairs // longest)
        self.all_fit = True
        if distinct:
            self.costs = costs_of(scorer, tokens, self.queries)
            largest = min(self.batch_size * longest, int(lists.present.sum()))
            self.plan = plan(self.costs, memory, pairs=largest, pictures=distinct)
            self.all_fit = distinct <= self.plan.room
            self.opened.room = self.plan.room
            self.opened.at_once = max(1, self.plan.working // max(1, self.costs.reading))

    def batches(self) -> list[NDArray[np.int64]]:
        """Queries of similar length together, or, where not all pictures fit, those that begin with the same."""
        lengths = np.array([len(ids) for ids in self.queries])
        first = self.lists.rows[:, 0] if self.lists.rows.shape[1] else lengths
        order = np.argsort(lengths if self.all_fit else first, kind="stable")
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def score(self, batch: NDArray[np.int64]) -> Scores:
        """Scores (batch, longest) of the chosen queries."""
        rows, present = self.lists.rows[batch], self.lists.present[batch]
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        if not present.any():
            return scores
        of_query, pictures = torch.from_numpy(np.nonzero(present)[0]), rows[present]
        queries = [self.queries[query] for query in batch]
        most = self.plan.working // self.costs.pair(max(map(len, queries)))
        if not self.all_fit:
            most = min(most, self.plan.room)
        parts = zip(of_query.split(most), np.split(pictures, range(most, len(pictures), most)), strict=True)
        scores[present] = torch.cat([self._score_pairs(queries, *part) for part in parts]).numpy()
        return scores

    def _score_pairs(self, queries: list[list[int]], of_query: Tensor, pictures: NDArray[np.int64]) -> Tensor:
        """Scores (pairs,), on the CPU, of pictures (pairs,) and of queries that `of_query` (pairs,) says."""
        used, of_query = of_query.unique(return_inverse=True)
        queries = [queries[place] for place in used]
        if self.scorer.compat is None:
            pairs = self.scorer.pairs(self.tokens[:0], queries, of_query, of_query)
            places = self.opened.places(pictures)
            return self.scorer.close(self.opened.layers, places, pairs).cpu()
        distinct, of_picture = np.unique(pictures, return_inverse=True)
        pairs = self.scorer.pairs(self.tokens[distinct], queries, torch.from_numpy(of_picture), of_query)
        found: Tensor = self.scorer(pairs)
        return found.cpu()


def _score_blocks(
    scoring: _Scoring, batches: list[NDArray[np.int64]], folder: Path, *, quiet: bool
) -> Iterator[Scores]:
    """Scores of all batches, this process computing its share of the blocks that are missing.

    Blocks of other batches, which a run with another `pairs` or `memory` has left, are not taken for these.
    """
    blocks = [batches[start : start + BLOCK_BATCHES] for start in range(0, len(batches), BLOCK_BATCHES)]
    ends = np.cumsum([len(batch) for batch in batches])
    cut = hashlib.blake2b(np.concatenate([ends, *batches]).astype(np.int64).tobytes(), digest_size=8).hexdigest()
    work = Blocks(folder / f"batches-{cut}", len(blocks))
    for number in work.left if quiet else progress(work.left, "scoring"):
        write_array(work.path(number), np.concatenate([scoring.score(batch) for batch in blocks[number]]))
    for path, block in zip(work.gather(), blocks, strict=True):
        ends = np.cumsum([len(batch) for batch in block])
        yield from np.split(np.asarray(read_array(path)), ends[:-1])
