"""The batches of a training, and the part of each that one process takes.

A batch is `batch_size` examples of all processes together. What is drawn for it depends on seed, epoch and number
alone. So the number of processes changes the speed, and dropout's masks, but nothing else.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tools import processes
from tools.errors import BadInput


class Batch(NamedTuple):
    """The examples of one forward and backward pass of all processes together."""

    rows: NDArray[np.int64]
    """(batch, ...) what the stage calls an example: a train query, or a picture and a caption."""
    seed: int
    """The training's seed."""
    epoch: int
    number: int
    """Position in its epoch."""

    def stream(self, number: int) -> int:
        """A seed for one purpose: 0 what is drawn alike in every process, 1 + n in process n."""
        words = [self.seed, self.epoch, self.number, number]
        return int(np.random.SeedSequence(words).generate_state(1)[0])


class Part(NamedTuple):
    """One process's part of a batch.

    What is drawn at random is drawn for the whole batch, alike in every process, and then indexed with `own`.
    """

    batch: Batch
    own: NDArray[np.int64]
    """(part,) places in the batch; never empty"""
    weight: float
    """Factor for the part's mean loss; it makes the mean over processes equal the batch's mean."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """(part, ...) examples of this process."""
        return self.batch.rows[self.own]

    def pieces(self, most: int | None) -> "list[Part]":
        """The part in pieces of nearly equal size, at most `most` examples each, whose losses add up to the part's.

        Every process gets the same number of pieces; DeepSpeed would hang otherwise. Where this process has fewer
        examples than others, one of its pieces may have no weight.
        """
        largest = -(-len(self.batch.rows) // processes.count())
        if most is None or largest <= most:
            return [self]
        cut = np.array_split(self.own, -(-largest // most))
        return [
            Part(self.batch, own if len(own) else self.own[:1], self.weight * len(own) / len(self.own)) for own in cut
        ]


def part_of(batch: Batch) -> Part:
    """This process's part of a batch. If there are fewer examples than processes, some parts have weight 0."""
    places = np.arange(len(batch.rows))[processes.number() :: processes.count()]
    weight = len(places) * processes.count() / len(batch.rows)
    return Part(batch, places if len(places) else np.zeros(1, dtype=np.int64), weight)


def rows_of_all(rows: Tensor) -> tuple[Tensor, int]:
    """The rows (part, width) of all processes one behind the other, and where this process's begin; no gradient."""
    if processes.count() == 1:
        return rows.detach(), 0
    counts = processes.collect(len(rows))
    padded = F.pad(rows.detach(), (0, 0, 0, max(counts) - len(rows)))
    found = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(found, padded)
    every = torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
    return every, sum(counts[: processes.number()])


def drawn(count: int, most: int | None, generator: np.random.Generator) -> NDArray[np.int64]:
    """`most` of `count` examples in random order; of fewer, all of them several times, as evenly as can be.

    Args:
        most: by default all, each once.
    """
    most = count if most is None else most
    passes = [generator.permutation(count) for _ in range(-(-most // count))]
    return np.concatenate(passes)[:most]


def bucketed_batches(
    lengths: NDArray[np.int64], size: int, generator: np.random.Generator, *, bucket: int = 32
) -> list[NDArray[np.int64]]:
    """Shuffled batches of texts of similar length: little padding, and every text once.

    Args:
        lengths: (queries,)
        bucket: batches that are sorted by length together; larger means less padding and less shuffling.
    """
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), size * bucket):
        some = order[start : start + size * bucket]
        some = some[np.argsort(lengths[some], kind="stable")]
        batches += [some[begin : begin + size] for begin in range(0, len(some), size)]
    generator.shuffle(batches)
    return batches


def check_batch_size(batch_size: int, *, least: int = 1, accumulates: bool = True) -> None:
    """Refuse a batch size that leaves a process without examples.

    Args:
        least: examples that a process needs.
        accumulates: several batches may make one step.

    Raises:
        BadInput: it is too small.
    """
    needed = least * processes.count()
    if batch_size < needed and processes.count() == 1:
        raise BadInput(f"`batch_size` must be at least {needed}")
    if batch_size < needed:
        raise BadInput(
            f"`batch_size` {batch_size} counts the examples of all {processes.count()} processes: raise it to "
            f"{needed} or more{', and lower `accumulate` as much' if accumulates else ''}"
        )
